"""What the cells of chat.ipynb call, in their order. Each shows its part, and notes it for result and report."""

import json
from contextlib import nullcontext

from IPython.display import display

from rwkv_lab.analysis.answers import Answer, Messages, Speaker, load_to_ask, read_prompts
from rwkv_lab.checkpoint import file_facts, open_checkpoint, write_text
from rwkv_lab.checkpoint.whole_model import whole_model
from rwkv_lab.checks import Check, NotApplicable
from rwkv_lab.dtypes import to_dtype
from rwkv_lab.errors import OutputError
from rwkv_lab.progress import Progress, frontend_present
from rwkv_lab.samples import Sample
from rwkv_lab.text import counted
from rwkv_lab.workbench import steps
from rwkv_lab.workbench.chat.parameters import ChatParameters
from rwkv_lab.workbench.estimate import in_words, memory_in_words, writing_seconds
from rwkv_lab.workbench.parameters import input_path
from rwkv_lab.workbench.run import Run
from rwkv_lab.workbench.steps import Step
from rwkv_lab.workbench.tables import Table

Asked = list[tuple[str | Messages, dict[str, Answer]]]


def preview(run: Run) -> None:
    """Show who would write, what that takes, and note nothing.

    Raises:
        RwkvLabError: a file that cannot be opened, or that is no whole model.
    """
    display(Table("The plan", ("", ""), _plan(run)))


def _plan(run: Run) -> list[tuple[str, object]]:
    """What is loaded and written, from headers."""
    both = [run.config] + ([second] if (second := run.config.beside()) else [])
    asked, rows, needed, seconds = len(_questions(run.config)), [], 0, 0.0
    for config, name in zip(both, _names(both), strict=True):
        with open_checkpoint(input_path(config.model)) as ck:
            values, layout = sum(t.numel for t in ck.info.values()), whole_model(ck)
        dtype = to_dtype(config.dtype)
        rows.append((name, f"{layout}; {_in_words(config)}"))
        needed += values * dtype.itemsize
        tokens = asked * config.max_new_tokens
        seconds += writing_seconds(tokens, layout.vocab_size, values, layout.n_layer, dtype)
    written = " and ".join(str(config.max_new_tokens) for config in both)
    return [
        *rows,
        ("prompts", f"{asked:,}, answered by at most {written} tokens each"),
        ("memory", memory_in_words(needed)),
        ("time", in_words(seconds)),
    ]


def load(run: Run) -> list[Speaker]:
    """Show the plan; load the model, and the second one where something is different in it.

    Raises:
        RwkvLabError: a file that cannot be opened, or that does not go with the others.
        OutputError: the output is there already.
    """
    run.begin_again()
    out = run.output_path("answers.json")
    if out.exists() and not run.may_overwrite():
        raise OutputError(f"{out} is there already; give another out, or overwrite=True.")
    both = [run.config] + ([second] if (second := run.config.beside()) else [])
    preview(run)
    with run.timed("load"):
        speakers = [_speaker(config, name) for config, name in zip(both, _names(both), strict=True)]
    files = {path for config in both for path in (config.model, config.state, config.adapter) if path}
    run.record.inputs = [file_facts(input_path(path)) for path in sorted(files)]
    run.page.facts = [(s.name, f"{s.model.layout}; {_in_words(c)}") for s, c in zip(speakers, both, strict=True)]
    display(Table("Who writes", ("", ""), run.page.facts))
    return speakers


def answer(run: Run, speakers: list[Speaker]) -> Asked:
    """Have every model write after every prompt, and write what came of it as JSON.

    Raises:
        ParameterError: a conversation that cannot be answered.
    """
    asked: Asked = []
    questions = _questions(run.config)
    counts = Progress("answers", len(questions), "prompts") if len(questions) > 1 else nullcontext()
    with run.timed("answers"), counts as progress:
        for question in questions:
            answers = {speaker.name: _said(speaker, question) for speaker in speakers}
            asked.append((question, answers))
            shown = _shown(question)
            run.page.samples.append(Sample(shown, {name: a.text for name, a in answers.items()}))
            display(Table(f"After the prompt {shown!r}", [*answers], [[a.text for a in answers.values()]]))
            if progress:
                progress.advance(1)
    tokens = sum(len(a.ids) for _, answers in asked for a in answers.values())
    seconds = sum(a.seconds for _, answers in asked for a in answers.values())
    of = "" if len(speakers) == 1 else f", {counted(len(speakers), 'answer')} each"
    prompts = f"{counted(len(asked), 'prompt')}{of}"
    rate = f"{tokens / max(seconds, 1e-9):,.0f} tokens/s, the reading of the prompt included"
    run.page.summary = f"{prompts}: {counted(tokens, 'token')}, {rate}."
    run.record.metrics |= {"prompts": len(asked), "tokens": tokens, "tokens_per_second": tokens / max(seconds, 1e-9)}
    out = run.output_path("answers.json")
    write_text(out, json.dumps(_as_json(asked), ensure_ascii=False, indent=1) + "\n", run.may_overwrite())
    run.page.headline = f"{out.name}: what {' and '.join(s.name for s in speakers)} wrote."
    run.record.metrics["answers"] = str(out)
    return asked


def converse(run: Run, speakers: list[Speaker]) -> None:
    """A box to write in, in JupyterLab: what the models answer appears while they write it."""
    if not frontend_present():
        print("No front end here: the answers above are all.")
        return
    from rwkv_lab.workbench.chat.conversation import Conversation  # ipywidgets take a second

    display(Conversation(run, speakers).box)


def prove(run: Run, speakers: list[Speaker], asked: Asked) -> None:
    """Ask the first question again with the same seed, and read the file back."""
    question, answers = asked[0]
    speaker = speakers[0]
    name = "tokens of the first answer that differ when it is asked again with its seed"
    if run.config.seed is None:
        run.record.checks = [NotApplicable(name, "seed is None")]
    else:
        first, again = answers[speaker.name].ids, _said(speaker, question, quiet=True).ids
        differ = sum(a != b for a, b in zip(first, again, strict=False)) + abs(len(first) - len(again))
        run.record.checks = [Check(name, differ, 0, differ == 0)]
    out = run.output_path("answers.json")
    same = json.loads(out.read_text("utf-8")) == _as_json(asked)
    run.record.checks.append(Check("answers in the re-opened file", "the same" if same else "others", "the same", same))
    steps.show_verdict(run)


def _speaker(config: ChatParameters, name: str) -> Speaker:
    model = load_to_ask(
        input_path(config.model),
        input_path(config.state) if config.state else None,
        input_path(config.adapter) if config.adapter else None,
        config.weights,
        config.alpha,
        config.tokenizer,
        config.dtype,
        config.device,
    )
    return Speaker(name, model, config.settings(), config.template, config.think)


def _names(both: list[ChatParameters]) -> list[str]:
    """The file of each; what differs where it is the same file."""
    names = [input_path(config.model).name for config in both]
    if len(names) == 2 and names[0] == names[1]:
        names[1] = ", ".join(f"{name} {value}" if value else f"no {name}" for name, value in both[0].second.items())
    return names


def _in_words(config: ChatParameters) -> str:
    files = [
        f"{what} {input_path(path).name}"
        for what, path in (("state", config.state), ("adapter", config.adapter))
        if path
    ]
    rounded = [] if config.weights == "none" else [f"weights in {config.weights}"]
    set_here = [f"{name} {value}" for name, value in config.settings().items() if value not in ([], None)]
    return "; ".join([*files, *rounded, ", ".join(set_here)])


def _questions(config: ChatParameters) -> list[str | Messages]:
    if config.prompts:
        return read_prompts(config.prompts)
    return [[{"role": "user", "content": config.prompt}] if config.conversation else config.prompt]


def _said(speaker: Speaker, question: str | Messages, quiet: bool = False) -> Answer:
    def tell(token: int, text: str) -> None:
        print(text, end="", flush=True)

    if not quiet:
        print(f"{speaker.name}: ", end="")
    found = speaker.answer(question, None if quiet or not frontend_present() else tell)
    if not quiet:
        print("" if frontend_present() else found.text)
    return found


def _shown(question: str | Messages) -> str:
    return question if isinstance(question, str) else str(question[-1].get("content", ""))


def _as_json(asked: Asked) -> list[dict]:
    return [
        {
            "prompt" if isinstance(question, str) else "messages": question,
            "answers": [
                {"by": name, "text": a.text, "ended_by": a.reason, "tokens": len(a.ids), "seconds": round(a.seconds, 3)}
                for name, a in answers.items()
            ],
        }
        for question, answers in asked
    ]


STEPS = (
    Step(load, "speakers"),
    Step(answer, "asked"),
    Step(converse),
    Step(prove),
)
MUST_PASS = True
