"""Every notebook runs on the bundled model."""

import asyncio
from functools import cache
from pathlib import Path

import pytest

NEEDS = 'needs a kernel: pip install "mmdlm[dev]"'
nbclient = pytest.importorskip("nbclient", reason=NEEDS)
nbformat = pytest.importorskip("nbformat", reason=NEEDS)
pytest.importorskip("ipykernel", reason=NEEDS)

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Runs a notebook once, in an empty folder; the result has outputs."""
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager

    home = tmp_path_factory.mktemp("notebooks")
    (home / "work").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
            patch.setenv(name, str(home / name.lower()))
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")

        @cache
        def run(file):
            notebook = nbformat.read(file, as_version=4)
            # Without kernel folders, "python3" is the running Python.
            specs = KernelSpecManager(kernel_dirs=[])
            manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs)
            client = nbclient.NotebookClient(
                notebook,
                km=manager,
                timeout=120,
                resources={"metadata": {"path": str(home / "work")}},
            )
            asyncio.run(client.async_execute())
            return notebook

        yield run


def outputs(cell):
    return cell.get("outputs", ())


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebook_runs(file, executed):
    assert any(outputs(cell) for cell in executed(file).cells)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_notebook_is_stored_without_outputs(file):
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    assert not any(outputs(cell) for cell in notebook.cells)


def test_captioning_notebook_shows_the_scene_and_the_trace(executed):
    notebook = executed(ROOT / "notebooks" / "captioning.ipynb")
    shown = [c.id for c in notebook.cells for o in outputs(c) if "image/png" in o.get("data", ())]
    assert shown == ["scene", "trace"]
