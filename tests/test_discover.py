import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mmdlm import discover

FILES = {
    "__init__.py": "",
    "animal.py": "class Animal:\n    pass\n",
    "cat.py": "from zoo.animal import Animal\nclass Cat(Animal):\n    pass\n",
    "house_cat.py": "from zoo import cat\nclass HouseCat(cat.Cat):\n    pass\n",
    "birds.py": (
        "from zoo.animal import Animal\nclass _Bird(Animal):\n    pass\n"
        "class Owl(_Bird):\n    pass\nclass Hen(_Bird):\n    pass\n"
    ),
    "stone.py": "class Stone:\n    pass\n",
    "lizard.py": "from zoo.animal import Animal\nclass Lizard(Animal):\n    pass\n1 / 0\n",
}


@pytest.fixture
def animal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type]:
    """Base class of a temporary package `zoo`."""
    (tmp_path / "zoo").mkdir()
    for name, text in FILES.items():
        (tmp_path / "zoo" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    discover._classes_by_module.cache_clear()
    yield importlib.import_module("zoo.animal").Animal
    discover._classes_by_module.cache_clear()
    for name in ["zoo", *(f"zoo.{Path(file).stem}" for file in FILES)]:
        sys.modules.pop(name, None)


def test_names_are_modules_with_a_public_subclass(animal: type) -> None:
    assert discover.names("zoo", animal) == ["birds", "cat", "house_cat", "lizard"]


@pytest.mark.parametrize("name", ["house_cat", "HouseCat", "house-cat", "housecat"])
def test_find_accepts_module_and_class_names(name: str, animal: type) -> None:
    assert discover.find("zoo", name, animal).__name__ == "HouseCat"


def test_find_accepts_one_class_of_a_module_with_several(animal: type) -> None:
    assert discover.find("zoo", "owl", animal).__name__ == "Owl"
    with pytest.raises(ValueError, match=r"several classes: Owl \(birds.py\), Hen \(birds.py\)"):
        discover.find("zoo", "birds", animal)


def test_find_imports_only_one_module(animal: type) -> None:
    assert discover.find("zoo", "cat", animal).__name__ == "Cat"
    with pytest.raises(ZeroDivisionError):
        discover.find("zoo", "lizard", animal)


def test_find_error_names_similar_names(animal: type) -> None:
    with pytest.raises(ValueError, match="zoo has no 'huose_cat'; did you mean 'house_cat'"):
        discover.find("zoo", "huose_cat", animal)
    with pytest.raises(ValueError, match="known: birds, cat, house_cat, lizard"):
        discover.find("zoo", "stone", animal)


def test_unknown_packages_are_rejected() -> None:
    with pytest.raises(ValueError, match="did you mean 'mmdlm.decoding'"):
        discover.names("mmdlm.decodings")
    with pytest.raises(ValueError, match="no package 'mmdlm.zoo'"):
        discover.names("mmdlm.zoo", int)
    with pytest.raises(ValueError, match="no package 'zoological.garden'"):
        discover.names("zoological.garden", int)


@pytest.mark.parametrize("package", discover.BASES)
def test_parsing_finds_the_same_classes_as_importing(package: str) -> None:
    module, _, base_name = discover.BASES[package].rpartition(".")
    base = getattr(importlib.import_module(module), base_name)
    folder = Path(inspect.getfile(base)).parent
    found = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        file = importlib.import_module(".".join((package, *parts)))
        for name, value in vars(file).items():
            ours = inspect.isclass(value) and value.__module__ == file.__name__
            if ours and issubclass(value, base) and value is not base and not name.startswith("_"):
                found[name] = value
    assert found
    assert discover.classes(package) == dict(sorted(found.items()))
    assert discover.names(package) == sorted({c.__module__.split(".")[-1] for c in found.values()})
