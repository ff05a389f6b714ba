"""`python -m deitfast`, and so `torchrun -m deitfast`."""

from deitfast.cli import main

if __name__ == "__main__":
    main()
