"""`mmdlm eval`: scores of a model on a user's data."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mmdlm.atomic import write_text
from mmdlm.benchmarks import report
from mmdlm.benchmarks.evaluate import (
    Evaluation,
    Failure,
    check,
    choose_metrics,
    compare,
    failures,
    settings,
    table,
    title,
    versus,
    warn_of_truncation,
)
from mmdlm.benchmarks.questions import key_of, open_sets, questions, replies, task_of
from mmdlm.benchmarks.sheet import check_name, draw_sheet
from mmdlm.commands.shown import Output, Run
from mmdlm.data.dataset import Dataset
from mmdlm.decoding import preset
from mmdlm.lines import as_line
from mmdlm.model import MultimodalDLM
from mmdlm.tasks.fingerprint import made_with
from mmdlm.tasks.results import Results

OWN = "default"
"""Name of the checkpoint's own decoding."""


@dataclass(frozen=True)
class Job:
    """What is asked, and how; `evaluate` documents the fields."""

    sets: dict[str, Dataset]
    metrics: tuple[str, ...]
    rows: int | None
    length: int | None
    seed: int
    batch_size: int
    output: Output

    def run(self, model: MultimodalDLM, name: str, decoding: str | None) -> list[Evaluation]:
        """One evaluation per data set."""
        return [self._one(data, model, name, decoding) for data in self.sets]

    def _one(self, data: str, model: MultimodalDLM, name: str, decoding: str | None) -> Evaluation:
        dataset = self.sets[data].connect(model.processor, model.preset)
        asked, unread = questions(dataset, self.rows, self.seed)
        task = task_of(dataset, asked)
        metrics = choose_metrics(self.metrics, task, asked)
        how = settings(model, task, asked, self.length, decoding)
        results = None
        if self.output.out is not None:
            job = {"task": "eval", "model": name, "decoding": decoding or OWN}
            made = made_with(model, how, {"seed": self.seed})
            kept = {"redo": self.output.redo, "keep": self.output.keep}
            results = Results(self.output.out, job, made, key_of, **kept)
        found = replies(model, asked, how, self.batch_size, self.seed, results, data)
        errors = [(one.place, r.error) for one, r in zip(asked, found, strict=True) if r.error]
        for place, error in (*unread.items(), *errors):
            print(f"mmdlm: failed: {place}: {error}", file=sys.stderr)
        made = Evaluation(data, name, decoding or OWN, asked, found, metrics, self.batch_size)
        warn_of_truncation(made, how.length)
        return replace(made, failed=len(unread) + len(errors))


def evaluate(
    data: Path,
    run: Run,
    output: Output,
    metrics: list[str] = (),
    against: str | None = None,
    decoding: str | None = None,
    rows: int | None = None,
    length: int | None = None,
    prompt: str | None = None,
    columns: list[str] = (),
    failed: Path | None = None,
    sheet: Path | None = None,
    cards: int = 24,
    seed: int = 0,
) -> int:
    """Score a model on your own data, with 95 % intervals, by group, and against another model.

    mmdlm eval --model my-model --data test.jsonl
    mmdlm eval --model my-model --data test.jsonl --against tiny --sheet sheet.png
    mmdlm eval --data test.jsonl --decoding fast --against exact --metrics exact,f1
    mmdlm eval --data clips.csv --columns audio=clip,answer=text --out replies.jsonl

    Every question is answered, and the answer compared with the accepted ones ("answers" of a row,
    else the assistant's message). Metrics, as 100 times the score:
      exact   equal apart from white space       f1     common words, as in SQuAD
      cider   captions, pycocoevalcap            rouge  ROUGE-L, pycocoevalcap
      bleu    BLEU, sacrebleu                    chrf   chrF2, sacrebleu
      wer     word error rate, jiwer             cer    character error rate, jiwer
      vqa     VQA accuracy of ten answers        anls   DocVQA's edit similarity
    By default: captions cider,bleu,rouge,exact; speech wer,cer,exact; questions exact,f1, and vqa
    where every question has four answers or more; text exact,f1,chrf. All but exact, f1 and vqa
    need pip install "mmdlm[eval]".

    Intervals come from 1,000 resamples of the rows. A comparison uses the same resamples for both,
    so an interval of the difference that leaves out 0 is a real difference on such data. Rows with
    "group" are also scored by group. Rows that fail are named and not scored (exit status 1).

    Args:
        data: file or folder of any format (mmdlm data formats), or a YAML file with data sets or a
            training config.
        run: which model runs, and where.
        output: where the answers are kept, so that a stopped run goes on.
        metrics: separated by commas, the most important one first; see above.
        against: a second model, or a decoding preset of the same model.
        decoding: decoding preset (see mmdlm list decoding) or YAML file; by default the
            checkpoint's own.
        rows: rows to ask, drawn at random; by default all.
        length: tokens of the answer's canvas; by default the checkpoint's own, or more if an
            accepted answer is longer.
        prompt: instruction of images and clips that come without a question.
        columns: columns of a table, such as image=photo,answer=caption.
        failed: JSON Lines file for questions, targets, answers and scores of what is not right,
            the worst first.
        sheet: image file for a contact sheet of these: image or waveform, question, target and
            answers.
        cards: questions on the contact sheet.
        seed: of the drawn rows, and of decodings that draw random numbers.
    """
    check(metrics)
    output.check()
    if sheet is not None:
        check_name(sheet)
    options = {} if prompt is None else {"prompt": prompt}
    sets = open_sets(data, **options, **_columns(columns))
    job = Job(sets, tuple(metrics), rows, length, seed, run.batch_size, output)
    model = run.load()
    found = [job.run(model, run.model, decoding)]
    if against is not None:
        name, way = run.model, against
        if not _is_decoding(against):
            del model
            name, way, model = against, decoding, replace(run, model=against).load()
        found.append(job.run(model, name, way))
    _report(found, run.json)
    pairs = list(zip(*found, strict=True))
    names = [title(*pairs[0]), title(*reversed(pairs[0]))] if against else [run.model]
    _show_failures([failures(*pair) for pair in pairs], names, failed, sheet, cards)
    return int(any(one.failed for each in found for one in each))


def _show_failures(
    wrong: list[list[Failure]],
    names: list[str],
    failed: Path | None,
    sheet: Path | None,
    cards: int,
) -> None:
    """Writes what is not right, by data set, as JSON Lines and as a contact sheet."""
    if failed is not None:
        lines = (as_line(one.to_dict(names)).decode() for each in wrong for one in each)
        write_text(failed, "".join(lines))
        print(f"{failed}: {sum(map(len, wrong))} answers that are not right", file=sys.stderr)
    if sheet is not None:
        shown = [one for each in wrong for one in each[:cards]]
        print(f"{draw_sheet(shown, names, sheet)}: drawn", file=sys.stderr)


def _report(found: list[list[Evaluation]], as_json: bool) -> None:
    """Prints scores, and the comparison of two models."""
    scores = [one.scores() for each in found for one in each]
    comparisons = [compare(*pair) for pair in zip(*found, strict=True)] if found[1:] else []
    if as_json:
        lines = [line for each in (*scores, *comparisons) for line in each]
        print("\n".join(report.as_json(lines)))
        return
    console = report.terminal()
    for each in scores:
        console.print(table(each))
    for each in comparisons:
        console.print(versus(each))
    report.sign(console)


def _is_decoding(name: str) -> bool:
    """Whether a name is that of a decoding preset, not of a model."""
    return name in preset.names() or name.endswith((".yaml", ".yml"))


def _columns(given: list[str]) -> dict[str, Any]:
    """Names of columns by their role."""
    pairs = [entry.partition("=") for entry in given]
    if not all(role and sign and name for role, sign, name in pairs):
        raise ValueError(f"columns is {','.join(given)}, expected such as image=photo,answer=text")
    return {role: name for role, _, name in pairs}
