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
    adapter: str | None = None,
    merge: bool = False,
    push_to_hub: str | None = None,
) -> int:
    """Writes a model as a folder for `mmdlm.load`, from a training checkpoint or another folder.

    mmdlm export runs/tiny/version_0/checkpoints/last.ckpt --out my-model --dtype bfloat16
    mmdlm export my-llada --out llada-for-others --layout published
    mmdlm export runs/finetune/version_0/checkpoints/last.ckpt --out my-adapter --push-to-hub me/it
    mmdlm export tiny --adapter my-adapter --out my-model

    The checkpoint of a run with LoRA becomes an adapter folder in peft's format.
    An earlier export is replaced when everything is written; other files of its folder stay.

    Args:
        checkpoint: a .ckpt file or folder of mmdlm fit; or a bundled name, folder or hub id.
        out: folder to write.
        dtype: type of the weights in the file; by default float32 from a .ckpt or with an adapter,
            else as stored.
        decoding: YAML file with prompt, length and strategies by task.
        card: Markdown file that becomes README.md.
        layout: own, or published: that of the system or family the model is of, for other tools.
        family: how to read a published checkpoint whose config.json does not tell; for any other,
            the family whose published layout is written.
        shard_bytes: most bytes per file of weights in the published layout.
        adapter: folder or hub id of a LoRA adapter to merge into the weights.
        merge: from a run with LoRA, write the whole model with the adapter merged into it.
        push_to_hub: upload the folder to this repository (owner/name); a new one is private.
    """
    from mmdlm.export import export as write
    from mmdlm.export import push
    from mmdlm.loading.ckpt import is_averaged, is_checkpoint

    model = write(
        checkpoint,
        out,
        dtype=dtype,
        decoding=decoding,
        card=card,
        layout=layout,
        family=family,
        shard_bytes=shard_bytes,
        adapter=adapter,
        merge=merge,
    )
    which = ""
    if is_checkpoint(checkpoint) and is_averaged(checkpoint):
        which = " with the averaged weights of the run, not those of its last step"
    use = "use it with --model MODEL --adapter" if model is None else "mmdlm info"
    print(f"{out}: written{which}; {use} {out}")
    if push_to_hub is not None:
        print(f"{push(out, push_to_hub)}: uploaded")
    return 0
