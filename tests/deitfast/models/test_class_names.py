"""Classes are matched by every name that they have, and never guessed."""

from importlib import resources

import pytest
import timm.data
from torchvision.models import ResNet18_Weights

from deitfast.models.class_names import imagenet_synsets, imagenet_word, match_classes
from pipelines.errors import UserError

SYNSETS = imagenet_synsets()
WORDS = tuple(ResNet18_Weights.DEFAULT.meta["categories"])
INFO = timm.data.ImageNetInfo()
LEMMAS = tuple(INFO.index_to_description(index) for index in range(1000))
"""What Hugging Face's id2label holds: "tench, Tinca tinca"."""
IMAGENETTE = (
    "n01440764", "n02102040", "n02979186", "n03000684", "n03028079", "n03394916", "n03417042", "n03425413",
    "n03445777", "n03888257",
)  # fmt: skip


def index(names: tuple[str, ...], wanted: tuple[str, ...], **more) -> tuple[int, ...]:
    return match_classes("net", names, len(names) or more.pop("count", 1000), wanted, **more).index


def test_synsets_are_timms_in_its_order() -> None:
    assert tuple(INFO.index_to_label_name(index) for index in range(1000)) == SYNSETS


@pytest.mark.parametrize("names", [SYNSETS, WORDS, LEMMAS, (), tuple(map(str, range(1000)))])
@pytest.mark.parametrize("wanted", [SYNSETS, WORDS, LEMMAS])
def test_imagenets_classes_are_the_same_under_all_their_names(names: tuple, wanted: tuple) -> None:
    assert index(names, wanted) == tuple(range(1000))


@pytest.mark.parametrize("names", [SYNSETS, WORDS, LEMMAS, ()])
def test_folders_of_numbers_are_imagenets_numbers_however_they_are_sorted(names: tuple) -> None:
    folders = tuple(sorted(map(str, range(1000))))  # 0, 1, 10, 100, ...: ImageNet-V2
    assert index(names, folders) == tuple(map(int, folders))


@pytest.mark.parametrize("names", [SYNSETS, WORDS, LEMMAS, ()])
def test_subsets_are_found(names: tuple) -> None:
    expected = tuple(SYNSETS.index(synset) for synset in IMAGENETTE)
    assert index(names, IMAGENETTE) == expected
    assert index(names, ("English_springer", "tench", "parachute")) == (217, 0, 701)
    assert index(names, ("Golden Retriever", "n02099601")[:1]) == (207,)


def test_the_same_name_spelled_otherwise_is_found() -> None:
    found = match_classes("net", ("Toy_Box", " cafe\u0301", "RED"), 3, ("caf\u00e9", "red", "toy box"))
    assert (found.index, found.how) == ((1, 2, 0), "by name, however it is spelled")
    assert match_classes("net", (), 1000, ("tench",)).how == "by synset, in ImageNet's order"
    assert match_classes("net", WORDS, 1000, ("n01440764",)).how == "by ImageNet's names"


def test_timms_lists_of_imagenet_a_and_r_are_found() -> None:
    for subset in "ar":
        lists = resources.files(timm.data) / "_info"
        wanted = tuple((lists / f"imagenet_{subset}_synsets.txt").read_text().split())
        expected = map(int, (lists / f"imagenet_{subset}_indices.txt").read_text().split())
        assert index((), wanted) == tuple(expected)
        assert len(wanted) == 200


def test_words_of_two_classes_are_refused() -> None:
    with pytest.raises(UserError, match="crane may be n02012849 or n03126707"):
        index((), ("crane", "tench"))
    with pytest.raises(UserError, match="does not know class unicorn"):
        index((), ("tench", "unicorn"))


def test_order_is_never_guessed() -> None:
    with pytest.raises(UserError, match="does not say what its 3 classes are"):
        index((), ("a", "b", "c"), count=3)
    assert index((), ("a", "b", "c"), count=3, assume_order=True) == (0, 1, 2)
    assert index(("c", "a", "b"), ("a", "b", "c"), assume_order=True) == (1, 2, 0)  # known names win
    with pytest.raises(UserError, match="does not know class 3"):
        index((), ("3", "4"))  # digits, say: not ImageNet's first classes
    assert index((), ("0", "1", "10", "2", "3", "4", "5", "6", "7", "8", "9"), count=11)[2] == 10
    with pytest.raises(UserError):
        index((), tuple(f"class {number}" for number in range(1000)))
    with pytest.raises(UserError):
        index(("a", "b"), ("a", "b", "c"), assume_order=True)


def test_a_synset_is_said_in_words_and_any_other_name_as_it_is() -> None:
    assert imagenet_word("n01440764") == "tench"
    assert imagenet_word("bee, honey bee") == "bee, honey bee"
