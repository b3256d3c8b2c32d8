"""The table of commands: which function each one calls, and what the overview says about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """One command.

    Args:
        place: module:function, imported when the command is called; in mmdlm.commands unless the
            module begins with "mmdlm.".
        line: what it does, for the overview.
        group: heading in the overview.
        positional: parameters given without their name.
        repeated: lists whose option is given once per item.
    """

    place: str
    line: str
    group: str
    positional: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()


ASK, TRAIN, LOOK = "Ask a model", "Train and measure", "Look around"
TRAINING = "train:run"
COMMANDS = {
    "caption": Command("ask:caption", "what pictures show", ASK, ("files",)),
    "answer": Command("ask:answer", "a question about images", ASK, ("files",), ("image", "stop")),
    "describe": Command("ask:describe", "what sounds are", ASK, ("files",)),
    "transcribe": Command("ask:transcribe", "what is said", ASK, ("files",)),
    "generate": Command("text:generate", "what follows a text", ASK, ("texts",)),
    "chat": Command("text:chat", "talk with a text model", ASK, ("checkpoint",)),
    "draw": Command("draw:draw", "an image of a text", ASK, ("texts",)),
    "infill": Command("ask:infill", "the [MASK]s of a text", ASK, ("templates",)),
    "embed": Command("ask:embed", "vectors of pictures or sounds", ASK, ("files",)),
    "index": Command("ask:index", "vectors of many files, for mmdlm search", ASK, ("files",)),
    "search": Command("ask:search", "files most like a text or a file", ASK, ("query",)),
    "likelihood": Command(
        "likelihood:likelihood",
        "how probable answers are",
        ASK,
        ("prompt", "answers"),
        ("image", "audio"),
    ),
    "act": Command("mmdlm.simulators.rollout:act", "drive a simulated robot", ASK),
    "drive": Command("mmdlm.simulators.driving:drive", "drive a simulated car", ASK),
    "demo": Command("demo:demo", "all of it at once, with the bundled model", ASK),
    "fit": Command(TRAINING, "train: mmdlm fit -c train/tiny", TRAIN),
    "validate": Command(TRAINING, "losses on held-out data", TRAIN),
    "test": Command(TRAINING, "losses on test data", TRAIN),
    "eval": Command("evaluate:evaluate", "scores on your own data", TRAIN),
    "predict": Command(TRAINING, "answers to questions of test data, as JSON Lines", TRAIN),
    "bench": Command("mmdlm.benchmarks.scores:bench", "quality and speed", TRAIN, ("what",)),
    "bench presets": Command(
        "mmdlm.benchmarks.tradeoff:bench_presets",
        "accuracy against forwards of every decoding preset",
        TRAIN,
        ("presets",),
    ),
    "bench train": Command(
        "mmdlm.benchmarks.training:bench_train",
        "training steps: time, padding, buckets, packing",
        TRAIN,
    ),
    "bench retrieval": Command(
        "mmdlm.benchmarks.retrieval:bench_retrieval",
        "how often a text finds its picture",
        TRAIN,
    ),
    "bench prune": Command(
        "mmdlm.benchmarks.pruning:bench_prune",
        "what dropping image tokens costs and saves",
        TRAIN,
        ("files",),
    ),
    "bench redundancy": Command(
        "mmdlm.benchmarks.redundancy:bench_redundancy",
        "image tokens that models from scratch and from AR models need",
        TRAIN,
    ),
    "bench plans": Command(
        "mmdlm.benchmarks.plans:bench_plans",
        "driving plans against recorded ones",
        TRAIN,
        ("data",),
    ),
    "export": Command(
        "export:export",
        "a model folder from a training checkpoint",
        TRAIN,
        ("checkpoint",),
    ),
    "filter": Command("filter:train", "a filter for Learn2PD, from prompts", TRAIN, ("prompts",)),
    "data formats": Command(
        "own_data:formats", "the forms of data that training reads", TRAIN, ("name",)
    ),
    "data check": Command(
        "own_data:check",
        "every problem of your data: mmdlm data check FILE",
        TRAIN,
        ("file",),
        ("option",),
    ),
    "data show": Command(
        "show:show", "your rows as the model gets them", TRAIN, ("file",), ("option",)
    ),
    "data make scenes": Command(
        "data:make_scenes",
        "drawn pictures with captions and questions",
        TRAIN,
        ("out",),
    ),
    "data make speech": Command(
        "data:make_speech", "spoken phrases with their words", TRAIN, ("out",)
    ),
    "data make episodes": Command(
        "data:make_episodes", "robot episodes of a scripted expert", TRAIN, ("out",)
    ),
    "data make driving": Command(
        "data:make_driving", "plans of a rule-based driver, with three images", TRAIN, ("out",)
    ),
    "list": Command("about:list_names", "what there is to choose from", LOOK, ("what",)),
    "info": Command("about:info", "what a checkpoint is and can do", LOOK, ("checkpoint",)),
    "doctor": Command("about:doctor", "what works on this machine", LOOK),
}
TRAINERS = tuple(name for name, command in COMMANDS.items() if command.place == TRAINING)
