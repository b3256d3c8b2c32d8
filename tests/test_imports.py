import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

import mmdlm

ROOT = Path(__file__).parent.parent
PACKAGES = ("encoders", "adapters", "mmdlm")
# Files and folders of mmdlm; each may import those in the lines above it, and itself.
LEVELS = (
    {"atomic", "files"},
    {"template_files", "byte_level", "word_list"},
    {"text", "discover", "lines", "media", "messages", "sandbox"},
    {"recipe", "jinja"},
    {"backbones", "chat"},
    {"layout", "image_prompt"},
    {"processor"},
    {"model"},
    {"blueprint", "representation"},
    {"systems"},
    {"loading"},
    {"decoding", "objectives"},
    {"checkpoint"},
    {"export"},
    {"speculative", "search"},
    {"data"},
    {"training"},
    {"tasks"},
    {"simulators"},
    {"rl", "serving"},
    {"benchmarks"},
    {"commands"},
    {"__main__"},
)
RANK = {unit: rank for rank, units in enumerate(LEVELS) for unit in units}
# Modules of encoders that adapters may import: base classes, never an encoder.
CONTRACTS = {"features", "arguments", "checks"}
# Python names of distributions that differ from the distribution names.
IMPORT_NAMES = {
    "pillow": "PIL",
    "pyyaml": "yaml",
    "scikit-image": "skimage",
    "scikit-learn": "sklearn",
    "gym-pusht": "gym_pusht",
    "highway-env": "highway_env",
    "imageio-ffmpeg": "imageio_ffmpeg",
    "espeakng-loader": "espeakng_loader",
    "pillow-heif": "pillow_heif",
}
# Packages that are always installed with a required distribution.
COMES_WITH = {
    "filelock": "torch",
    "huggingface_hub": "transformers",
    "tokenizers": "transformers",
    "mujoco": "metaworld",
    "rapidfuzz": "jiwer",
}
NOT_IN_TOWERS = {"lightning", "jsonargparse", "rich", "yaml", "soundfile", "safetensors", "tqdm"}


def sources(*packages: str) -> list[Path]:
    return [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Full dotted names of everything imported anywhere below `tree`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            dots = "." * node.level
            source = resolve_name(dots + (node.module or ""), package) if dots else node.module
            yield from (f"{source}.{alias.name}" for alias in node.names)


def at_import(tree: ast.Module) -> ast.Module:
    """Module without code that does not run on import."""

    class Outermost(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:  # noqa: N802
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:  # noqa: N802
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:  # noqa: N802
            only_types = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
            return None if only_types else self.generic_visit(node)

    return Outermost().visit(tree)


def wrong_direction(importer: str, target: str) -> bool:
    """Whether a module must not import a name; both are full dotted names."""
    ours, theirs = importer.split("."), target.split(".")
    if theirs[0] not in PACKAGES or importer == "mmdlm":
        return False
    if ours[0] != "mmdlm":
        within = theirs[0] == ours[0]
        contract = theirs[0] == "encoders" and "".join(theirs[1:2]) in CONTRACTS
        return not within and not (ours[0] == "adapters" and contract)
    if theirs[0] != "mmdlm" or len(theirs) == 1:
        return False
    unit = theirs[1]
    if unit in mmdlm._FILES:  # a public name, replaced by its file
        unit = mmdlm._FILES[unit].split(".")[1]
    if unit == ours[1] or unit not in RANK:  # mmdlm.__version__
        return False
    return RANK[unit] >= RANK[ours[1]]


def declared() -> tuple[set[str], set[str]]:
    """Python names of the core dependencies, and of those plus all extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def python_names(requirements: list[str]) -> set[str]:
        bare = [r.split("[")[0].split("<")[0].split(">")[0].split("=")[0] for r in requirements]
        names = {IMPORT_NAMES.get(name, name) for name in bare}
        return names | {part for part, whole in COMES_WITH.items() if whole in names}

    core = python_names(project["dependencies"])
    extras = project["optional-dependencies"]
    return core, core.union(*(python_names(e) for name, e in extras.items() if name != "dev"))


def test_every_module_has_a_level() -> None:
    units = {path.relative_to(ROOT / "mmdlm").parts[0] for path in sources("mmdlm")}
    assert {unit.removesuffix(".py") for unit in units} - {"__init__"} <= set(RANK)


def test_imports_go_one_way() -> None:
    wrong = []
    for path in sources(*PACKAGES):
        name = module_name(path)
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        for target in imported(ast.parse(path.read_text()), package):
            if wrong_direction(name, target):
                wrong.append(f"{path.relative_to(ROOT)} imports {target}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("importer", "target", "wrong"),
    [
        ("encoders.vit", "encoders.features.Features", False),
        ("encoders.vit", "adapters.mlp.MLP", True),
        ("encoders.vit", "mmdlm.text.Tokenizer", True),
        ("adapters.mlp", "encoders.features.Features", False),
        ("adapters.mlp", "encoders.vit.ViT", True),
        ("adapters.mlp", "encoders", True),
        ("adapters.mlp", "mmdlm.layout.Sequence", True),
        ("mmdlm.model", "encoders.vit.ViT", False),
        ("mmdlm.model", "mmdlm.layout.Sequence", False),
        ("mmdlm.layout", "mmdlm.model.MultimodalDLM", True),
        ("mmdlm.decoding.plans.blocks", "mmdlm.decoding.strategy.Strategy", False),
        ("mmdlm.decoding.plans.blocks", "mmdlm.objectives.masked.Masked", True),
        ("mmdlm.data.scenes", "mmdlm.caption", True),
        ("mmdlm.commands.main", "mmdlm.caption", False),
        ("mmdlm.data.scenes", "mmdlm.__version__", False),
    ],
)
def test_direction_rule(importer: str, target: str, wrong: bool) -> None:
    assert wrong_direction(importer, target) is wrong


def test_modules_import_only_core_dependencies_at_the_top() -> None:
    core, _ = declared()
    allowed = core | set(PACKAGES) | sys.stdlib_module_names
    wrong = []
    for path in sources(*PACKAGES):
        tree = at_import(ast.parse(path.read_text()))
        for target in imported(tree, module_name(path)):
            root = target.split(".")[0]
            tower = module_name(path).split(".")[0] in ("encoders", "adapters")
            if root not in allowed or (tower and root in NOT_IN_TOWERS):
                wrong.append(f"{path.relative_to(ROOT)} imports {root}")
    assert not wrong, "\n".join(wrong)


def test_functions_import_what_an_extra_declares() -> None:
    _, known = declared()
    allowed = known | set(PACKAGES) | sys.stdlib_module_names
    wrong = []
    for path in sources(*PACKAGES):
        for target in imported(ast.parse(path.read_text()), module_name(path)):
            if target.split(".")[0] not in allowed:
                wrong.append(f"{path.relative_to(ROOT)} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_files_stay_short() -> None:
    sizes = {p.relative_to(ROOT): len(p.read_text().splitlines()) for p in sources(*PACKAGES)}
    assert not {str(path): size for path, size in sizes.items() if size > 400}


def run_python(code: str, folder: Path, *path: Path) -> subprocess.CompletedProcess[str]:
    """Result of `python script.py` for a script in a folder."""
    script = folder / "script.py"
    script.write_text(code)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    return subprocess.run(
        [sys.executable, str(script)], cwd=folder, env=env, capture_output=True, text=True
    )


def test_package_import_is_light(tmp_path: Path) -> None:
    code = (
        "import time; start = time.perf_counter(); import mmdlm, sys, json; "
        "print(json.dumps([time.perf_counter() - start, sorted(sys.modules)]))"
    )
    run = run_python(code, tmp_path, ROOT)
    seconds, loaded = json.loads(run.stdout)
    heavy = "lightning timm transformers torchvision torchaudio PIL einops soundfile rich scipy"
    assert not set(heavy.split()) & set(loaded)
    assert seconds < 10


@pytest.mark.parametrize("name", [n for n in mmdlm.__all__ if n != "__version__"])
def test_public_name_exists(name: str) -> None:
    assert getattr(mmdlm, name).__name__ == name
    assert name in dir(mmdlm)


def test_unknown_public_name_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match="captions.*it has load, decode"):
        mmdlm.captions  # noqa: B018


def test_table_of_public_names_is_complete() -> None:
    assert {*mmdlm._FILES, "__version__"} == set(mmdlm.__all__)


def make_foreign(folder: Path) -> Path:
    """Folder with the contents of AdapterHub's distribution."""
    (folder / "adapters").mkdir(parents=True)
    (folder / "adapters" / "__init__.py").write_text("")
    info = folder / "adapters-1.2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: adapters\nVersion: 1.2.0\n")
    (info / "RECORD").write_text("adapters/__init__.py,,\n")
    return folder


def test_foreign_distribution_before_ours_is_named(tmp_path: Path) -> None:
    foreign = make_foreign(tmp_path / "site")
    run = run_python("import mmdlm", tmp_path, foreign, ROOT)
    assert run.returncode == 1
    assert "ImportError" in run.stderr
    assert str(foreign / "adapters") in run.stderr
    assert "pip uninstall adapters" in run.stderr


def test_foreign_distribution_in_our_folder_is_named(tmp_path: Path) -> None:
    site = make_foreign(tmp_path / "site")
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package,
            site / package,
            ignore=shutil.ignore_patterns("__pycache__", "models"),
            dirs_exist_ok=True,
        )
    run = run_python("import mmdlm", tmp_path, site)
    assert run.returncode == 1
    assert "adapters-1.2.0" in run.stderr
    assert "fresh environment" in run.stderr


@pytest.mark.parametrize("name", ["adapters/__init__.py", "encoders/__init__.py", "adapters.py"])
def test_script_next_to_a_package_of_our_name_gets_an_error(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    run = run_python("import mmdlm", tmp_path, ROOT)
    assert run.returncode == 1
    assert str(tmp_path / name.removesuffix("/__init__.py")) in run.stderr
    assert "rename it" in run.stderr


def test_data_folder_of_our_name_next_to_a_script_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "weights.txt").write_text("")
    run = run_python("import mmdlm, adapters; print(adapters.__file__)", tmp_path, ROOT)
    assert run.stdout.strip() == str(ROOT / "adapters" / "__init__.py"), run.stderr
