"""Verbs → code. Nothing heavy is imported before a verb needs it."""

import importlib
import os
import sys
from collections.abc import Callable, Sequence

VERBS = {  # verb: (module, whose `run` takes verb and arguments; what it does)
    "fit": ("moepp.training.lightning_cli", "train: moepp fit --config recipes/moepp.yaml"),
    "validate": ("moepp.training.lightning_cli", "validation loss of a checkpoint"),
    "test": ("moepp.training.lightning_cli", "the same as validate"),
    "plan": (
        "moepp.training.planning",
        "memory, bytes and time of a step on many devices, on paper: --devices=64",
    ),
    "ablate": ("moepp.study.compare.ablate", "variants × seeds → a report: --matrix recipes/compare.yaml"),
    "figures": ("moepp.study.figures.command", "what the router does, drawn and counted: --ckpt PATH"),
    "eval": ("moepp.study.eval.command", "tasks of lm-eval, and the experts that they take: --tasks=paper"),
    "prepare": ("moepp.training.commands", "text → tokenizer → token files"),
    "generate": ("moepp.training.commands", "text from a checkpoint"),
    "import": ("moepp.training.commands", "a Hugging Face folder (MoE++, Mixtral, …) → a checkpoint"),
    "convert": ("moepp.training.commands", "a vanilla MoE or dense checkpoint → one with more experts"),
    "export": ("moepp.training.commands", "a checkpoint → a Hugging Face folder: --format=hf is for transformers"),
}
EXTRAS = {
    "study": {"matplotlib", "scipy", "pandas", "jinja2"},
    "eval": {"lm_eval"},
    "litdata": {"litdata"},
}  # and what they bring


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code: 0, or 2 after one line that names what was wrong with the input."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        return one_line_errors("help", lambda: print(usage(), flush=True))
    verb, *rest = arguments
    if verb == "--version":
        from moepp import __version__

        print(f"moepp {__version__}")
        return 0
    if verb not in VERBS:
        return fail(f"{verb}: is no verb, use one of {', '.join(VERBS)}")
    for argument in rest:
        if any("\ud800" <= letter <= "\udfff" for letter in argument):  # how Python marks bytes that are no text
            return fail(f"{verb}: {argument!r} is not UTF-8")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # torch's own switch for large pages under large tensors: 2 to 11 % of a training step on a CPU
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    module, _ = VERBS[verb]
    return one_line_errors(verb, lambda: start(module, verb, rest))


def start(module: str, verb: str, arguments: list[str]) -> None:
    from moepp.system.lean import import_lightning

    import_lightning()
    importlib.import_module(module).run(verb, arguments)


def one_line_errors(verb: str, run: Callable[[], None]) -> int:
    """The exit code of `run`: bad input ends in one line on stderr."""
    try:
        try:
            run()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package == "moepp":
            raise
        extra = next((f"'moepp[{name}]'" for name, brings in EXTRAS.items() if package in brings), package)
        # without a name it is a library that says itself what it lacks
        return fail(f"{verb}: " + (f"needs {package}: pip install {extra}" if package else str(error)))
    except Exception as error:
        from moepp.model.errors import InputError  # torch comes with it, which `--help` can do without

        if not isinstance(error, InputError | OSError):  # permissions, a full disk: the error names the file
            raise
        return fail(f"{verb}: {error}")
    except KeyboardInterrupt:
        print(f"moepp {verb}: interrupted", file=sys.stderr)
        return 130
    return 0


def usage() -> str:
    verbs = "\n".join(f"  {verb:<10}{what}" for verb, (_, what) in VERBS.items())
    return f"usage: moepp VERB [OPTIONS]\n\n{verbs}\n\n`moepp VERB --help` lists the options of one."


def fail(message: str) -> int:
    print("moepp " + " ".join(message.split()), file=sys.stderr)
    return 2
