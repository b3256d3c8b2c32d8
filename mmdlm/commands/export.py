"""Commands that write files from a model: export."""

from __future__ import annotations

from pathlib import Path
from typing import Literal


def export(
    checkpoint: str,
    out: Path,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    decoding: Path | None = None,
    card: Path | None = None,
    layout: Literal["own", "published"] = "own",
    family: str | None = None,
    shard_bytes: float = 5e9,
) -> int:
    """Writes a model as a folder for `mmdlm.load`, from a training checkpoint or another folder.

    mmdlm export runs/tiny/version_0/checkpoints/last.ckpt --out my-model --dtype bfloat16
    mmdlm export my-llada --out llada-for-others --layout published

    An earlier export is replaced when everything is written; other files of its folder stay.

    Args:
        checkpoint: a .ckpt file of mmdlm fit; or a bundled name, folder or hub id.
        out: folder to write.
        dtype: type of the weights in the file; by default float32 from a .ckpt, else as stored.
        decoding: YAML file with prompt, length and strategies by task.
        card: Markdown file that becomes README.md.
        layout: own, or published: that of the system or family the model is of, for other tools.
        family: how to read a published checkpoint whose config.json does not tell; for any other,
            the family whose published layout is written.
        shard_bytes: most bytes per file of weights in the published layout.
    """
    from mmdlm.export import export as write

    write(
        checkpoint,
        out,
        dtype=dtype,
        decoding=decoding,
        card=card,
        layout=layout,
        family=family,
        shard_bytes=shard_bytes,
    )
    print(f"{out}: written; mmdlm info {out}")
    return 0
