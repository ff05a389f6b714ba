"""What a GPU does with deitfast: sections that measure, and the session that runs them; see tools/gpu_check."""
