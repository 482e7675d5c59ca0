"""Execute the tutorials and write them as notebooks with their output.

python tutorials/build.py [NAME ...]
"""

from __future__ import annotations

import base64
import sys
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from tqdm import tqdm

HERE = Path(__file__).parent
IMAGES = HERE.parent / "docs" / "images"


def sources() -> list[Path]:
    """The tutorials' sources, in order."""
    return sorted(path for path in HERE.glob("[0-9][0-9]_*.py"))


def execute(source: Path, *, timeout: int = 900) -> nbformat.NotebookNode:
    """Run a tutorial from its source; a claim that does not hold fails its cell."""
    notebook = jupytext.read(source)
    for index, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{index}"  # not random: building again changes nothing
    NotebookClient(notebook, timeout=timeout, resources={"metadata": {"path": str(HERE)}}).execute()
    for cell in notebook.cells:
        cell.get("metadata", {}).pop("execution", None)
        # Progress bars: noise that differs from run to run.
        if "outputs" in cell:
            cell.outputs = [out for out in cell.outputs if out.get("name") != "stderr"]
    return notebook


def save_pictures(notebook: nbformat.NotebookNode, stem: str) -> None:
    """Write a notebook's figures as files, for the README and the documentation."""
    IMAGES.mkdir(exist_ok=True)
    outputs = [out.get("data", {}) for cell in notebook.cells for out in cell.get("outputs", [])]
    pictures = [data["image/png"] for data in outputs if "image/png" in data]
    for index, picture in enumerate(pictures):
        (IMAGES / f"{stem}_{index}.png").write_bytes(base64.b64decode(picture))


def main(names: list[str]) -> None:
    """Build the named tutorials, or all."""
    for source in tqdm([path for path in sources() if not names or path.stem in names]):
        notebook = execute(source)
        nbformat.write(notebook, source.with_suffix(".ipynb"))
        save_pictures(notebook, source.stem)


if __name__ == "__main__":
    main(sys.argv[1:])
