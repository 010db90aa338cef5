"""The notebooks are committed without outputs, define nothing, and run: here on what is small."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client.manager import KernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from luve_lightning.ablations.results import COLUMNS

REPOSITORY = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))
NAMES = [
    "01_denoising_spectra", "02_vluer_against_interpolation", "03_what_each_expert_changes", "04_ablation_tables",
]  # fmt: skip
LIBRARIES = {
    "IPython", "collections", "csv", "diffusers", "json", "luve_lightning", "math", "matplotlib", "os", "pathlib",
    "torch", "transformers",
}  # fmt: skip


def stem(path: Path) -> str:
    return path.stem


def code_cells(path: Path) -> list[Any]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def program(path: Path) -> ast.Module:
    """All code of a notebook, without IPython's magics."""
    lines = "\n".join(cell.source for cell in code_cells(path)).splitlines()
    return ast.parse("\n".join(line for line in lines if not line.startswith("%")))


def parameters(path: Path) -> Any:
    [cell] = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
    return cell


@pytest.fixture(scope="module")
def kernel() -> Iterator[KernelManager]:
    """One for all notebooks: to import what they need takes most of their time."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(REPOSITORY / "notebooks"))
    yield manager
    manager.shutdown_kernel(now=True)


def run(kernel: KernelManager, path: Path, **values: object) -> tuple[str, int]:
    """Runs a notebook with other parameters; returns what it shows as text, and how many pictures."""
    notebook = nbformat.read(path, as_version=4)
    [place] = [n for n, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    given = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    source = f"from pathlib import Path, PosixPath\n{given}"
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(source))
    # A notebook finds the names of none that ran before it.
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    done = NotebookClient(notebook, km=kernel, timeout=250).execute()
    outputs = [output for cell in done.cells for output in cell.get("outputs", [])]
    shown = [output.data for output in outputs if output.output_type in ("display_data", "execute_result")]
    text = "\n".join(data.get("text/markdown", data.get("text/plain", "")) for data in shown)
    return text, sum("image/png" in data for data in shown)


def test_there_are_four() -> None:
    assert [path.stem for path in NOTEBOOKS] == NAMES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=stem)
def test_outputs_are_stripped(path: Path) -> None:
    nbformat.validate(nbformat.read(path, as_version=4))
    for cell in code_cells(path):
        assert cell.outputs == []
        assert cell.execution_count is None
    assert path.stat().st_size < 20_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=stem)
def test_it_imports_the_package_and_defines_nothing(path: Path) -> None:
    tree = program(path)
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    assert not [node for node in ast.walk(tree) if isinstance(node, kinds)]
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }
    assert "luve_lightning" in imported
    assert imported <= LIBRARIES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=stem)
def test_parameters_are_plain_values_and_nothing_is_written_unasked(path: Path) -> None:
    for node in ast.parse(parameters(path).source).body:
        assert isinstance(node, ast.Import | ast.ImportFrom | ast.Assign)
    assert 'figures = os.environ.get("LUVE_FIGURES")' in parameters(path).source


@pytest.mark.slow
def test_01_denoising_spectra(kernel: KernelManager, tmp_path: Path) -> None:
    text, pictures = run(
        kernel, NOTEBOOKS[0], prompts=["a photograph of old coins .", "a photograph of dry grass ."], frames=5,
        height=64, width=64, steps=3, figures=str(tmp_path),
    )  # fmt: skip
    assert pictures == 3
    assert "sigma_switch" in text
    assert (tmp_path / "denoising-spectra.png").stat().st_size > 5000


@pytest.mark.slow
def test_02_vluer_against_interpolation(kernel: KernelManager, tmp_path: Path, tiny_clips: Path) -> None:
    text, pictures = run(
        kernel, NOTEBOOKS[1], index=tiny_clips / "clips.csv", size=(64, 64), frames=5, clips=1, figures=str(tmp_path)
    )
    assert pictures == 2
    for method in ("vluer", "bilinear", "rgb_bicubic", "vae"):
        assert f"| {method} |" in text
    assert "Coloured squares drift to the left." in text
    assert (tmp_path / "vluer-against-interpolation.jpg").is_file()


@pytest.mark.slow
def test_03_what_each_expert_changes(kernel: KernelManager, tmp_path: Path, tiny_cascade: Path) -> None:
    text, pictures = run(
        kernel, NOTEBOOKS[2], backbone=tiny_cascade / "wan", weights=tiny_cascade / "vluer",
        refiner=tiny_cascade / "refiner", experts=tiny_cascade / "experts", prompt="a red boat sails", frames=5,
        motion=(32, 32), size=(64, 64), steps=4, skip_steps=1, guidance=1.0, edges=(0.0, 0.5, 1.0),
        figures=str(tmp_path),
    )  # fmt: skip
    assert pictures == 3
    # Steps of sigma 0.9375, 0.833 and 0.625: the first is the low-frequency expert's.
    assert "| none | 3 | 0 | 0 |" in text
    assert "| both | 0 | 1 | 2 |" in text
    assert (tmp_path / "experts-by-frequency.png").is_file()


@pytest.mark.slow
def test_04_ablation_tables_says_when_there_are_none(kernel: KernelManager, tmp_path: Path) -> None:
    text, pictures = run(kernel, NOTEBOOKS[3], results=tmp_path)
    assert "None yet" in text
    assert pictures == 0


@pytest.mark.slow
def test_04_ablation_tables(kernel: KernelManager, tmp_path: Path) -> None:
    lines = [
        "experts,full,full,fd_patch_vae,,lower,3,10.5,9.5,11.5,41.03,FID_patch,0,0,0,0,,",
        "experts,without_lfe,no LFE,fd_patch_vae,,lower,3,12.25,11,13.5,43.86,FID_patch,1.75,1.25,2.25,2.83,same,2",
        "experts,one_seed,one seed,fd_patch_vae,,lower,1,12,,,,,1.5,,,,,",
    ]
    (tmp_path / "experts.csv").write_text("\n".join([",".join(COLUMNS), *lines]) + "\n")
    (tmp_path / "experts.json").write_text('{"world": "mini world: small", "seeds": [0, 1, 2]}')
    text, pictures = run(kernel, NOTEBOOKS[3], results=tmp_path, figures=str(tmp_path))
    assert pictures == 1
    assert "mini world: small" in text
    assert "| 12.25 [11, 13.5] | 1.75 [1.25, 2.25] | 43.86 (FID_patch) |" in text
    assert "| 12 | 1.5 |" in text
    assert "without_lfe (fd_patch_vae)" in text
    assert (tmp_path / "ablation-experts.png").is_file()


@pytest.mark.slow
def test_a_broken_notebook_fails(kernel: KernelManager, tmp_path: Path) -> None:
    notebook = copy.deepcopy(nbformat.read(NOTEBOOKS[3], as_version=4))
    notebook.cells.append(nbformat.v4.new_code_cell("1 / 0"))
    nbformat.write(notebook, tmp_path / "broken.ipynb")
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        run(kernel, tmp_path / "broken.ipynb", results=tmp_path)
