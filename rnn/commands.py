"""The two command lines: options in, exit status out; every error a user can cause is one line on stderr.

`char_gru.rnn.process` runs them as programs, with what that means for streams and signals.
"""

from __future__ import annotations

import atexit
import contextlib
import difflib
import io
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace

import tyro

from char_gru.rnn.config import GenerateConfig, TrainConfig, UserError
from char_gru.rnn.process import DIVERGED, USAGE_ERROR, ended_at_once, status_after
from char_gru.rnn.terminal import complain, displayed

_TEXT_OPTIONS = ("--prompt", "--stop", "--separator", "--temperature")
"""Options whose value may begin with a dash, or be empty."""


def train(arguments: Sequence[str] | None = None) -> int:
    """`train.py`: train a model. Exit status 0, 1 if it diverged, 2 for bad input, 128 + the number of a signal."""
    def command() -> int:
        with ended_at_once():
            from char_gru.rnn import training

        config, given = _parse(TrainConfig, arguments, prog="train.py"), _given(arguments)
        try:
            if config.resume:
                with training.folder_to_resume(config.out) as files:
                    before, checkpoint = training.resumable_run(files)
                    # tyro would turn a flag that is on into --no-...
                    defaults = replace(before, resume=False, stateful=False)
                    if "--epochs" in given:  # what is given now decides, not an earlier --steps
                        defaults = replace(defaults, steps=None)
                    config = replace(_parse(TrainConfig, arguments, prog="train.py", default=defaults), out=before.out,
                                     resume=True, stateful=config.stateful or before.stateful)
                    return training.train(config, files, checkpoint, schedule_given="--lr-schedule" in given)
            checkpoint = None
            if config.init_from is not None:
                defaults, checkpoint = training.starting_point(config.init_from)
                config = _parse(TrainConfig, arguments, prog="train.py", default=defaults)
            return training.train(config, checkpoint=checkpoint)
        except training.Diverged as error:
            complain("train.py", f"training diverged: {error}")
            return DIVERGED

    return _reporting("train.py", command)


def generate(arguments: Sequence[str] | None = None) -> int:
    """`generate.py`: write texts, or score a text. Exit status 0, 2 for bad input, 128 + the number of a signal."""
    def command() -> int:
        config = _parse(GenerateConfig, arguments, prog="generate.py")
        if sys.stdout is None:
            raise UserError("stdout is closed, and what is written there would be lost; send it to a file or a program")
        with ended_at_once():
            from char_gru.rnn.sampler import Generator, new_seed
        from char_gru.rnn.texts import read_text

        if config.score is not None:
            text, generator = read_text(config.score), Generator.load(config.run, config.device)
            score = generator.score(generator.vocabulary.line_ends(text), config.on_unknown)
            print(json.dumps({"loss": score.loss, "bits_per_char": score.loss / math.log(2),
                              "characters": score.characters}))
            return 0
        prompts = _prompts(config)
        seed = new_seed() if config.seed is None else config.seed
        generator = Generator.load(config.run, config.device)
        prompts = [generator.vocabulary.line_ends(prompt) for prompt in prompts]
        rows = [prompt for prompt in prompts for _ in range(config.num_samples)]
        pieces = generator.stream(
            rows, config.length, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
            min_p=config.min_p, stop=config.stop, seed=seed, on_unknown=config.on_unknown)
        if config.seed is None:
            print(f"--seed {seed}", file=sys.stderr)
        return _print_texts(rows, pieces)

    return _reporting("generate.py", command)


def _parse(config_type: type, arguments: Sequence[str] | None, prog: str, **options):
    """The config that a command line gives.

    Raises: UserError, one line, for a mistake in the command line.
    """
    known = {"--help", *("--" + field.name.replace("_", "-") for field in fields(config_type)
                         if "Positional" not in field.type)}
    joined = _joined(sys.argv[1:] if arguments is None else arguments, known)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(sys.stdout or io.StringIO()):
            return tyro.cli(config_type, args=joined, prog=prog, config=(tyro.conf.FlagCreatePairsOff,), **options)
    except SystemExit as stop:
        if stop.code != USAGE_ERROR:
            raise
        box = [line.strip("│ ") for line in complaint.getvalue().splitlines() if line.startswith("│")]
        said = " ".join(itertools.takewhile(lambda line: not line.startswith("─"), box)) or complaint.getvalue()
        said = said.partition("  Got errors")[0].rstrip(".")
        raise UserError(f"{said}; {_meant(said, joined, known, prog)}see {prog} --help") from None


def _joined(arguments: Sequence[str], known: set[str]) -> list[str]:
    """The arguments, each text option in one piece with its value.

    Raises: UserError for an option of `known` where a value is due, and for an empty value that is no text.
    """
    joined: list[str] = []
    for argument in arguments:
        option, last = argument.partition("=")[0], joined[-1] if joined else ""
        if last in (*_TEXT_OPTIONS, "--data") and option in known:
            raise UserError(f"{last} has no value before {argument}; if that is its value, write {last}={argument}")
        if last in _TEXT_OPTIONS:
            joined[-1] += "=" + argument
        elif argument in ("", option + "=") and option not in _TEXT_OPTIONS:
            named = option if option in known else last if last in known else "an argument"
            raise UserError(f"{named} is empty; give it a value, or leave it out")
        else:
            joined.append(argument)
    if joined[-1:] == ["--data"]:
        raise UserError("--data has no value; name a text")
    return joined


def _meant(said: str, arguments: list[str], known: set[str], prog: str) -> str:
    """A question about what a command line with unknown arguments may mean, or an empty string."""
    strange, _, strangers = said.partition(": ")
    options = [option for option in (argument.partition("=")[0] for argument in arguments)
               if option.startswith("--") and option.replace("_", "-") not in known]
    if not strange.startswith("Unrecognized"):
        return ""
    if options:
        close = difflib.get_close_matches(options[0][2:], [option[2:] for option in known], 1)
        return f"did you mean --{close[0]}? " if close else ""
    return f"did you mean {'--data' if prog == 'train.py' else '--prompt'} {strangers.replace(', ', ' ')}? "


def _given(arguments: Sequence[str] | None) -> set[str]:
    """Names of the options on a command line, with dashes."""
    words = sys.argv[1:] if arguments is None else arguments
    return {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}


def _end_at_once(error: RuntimeError) -> None:
    """End the process, after a failure of the GPU: nothing on it can be freed any more, and CuPy would say so for each
    of its objects. Until then the error keeps them, by its traceback."""
    if sys.stdout is not None:
        sys.stdout.flush()
    os._exit(USAGE_ERROR)


def _reporting(prog: str, command: Callable[[], int]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    try:
        return command()
    except UserError as error:
        complain(prog, error)
    except RuntimeError as error:
        from char_gru.kernels.runtime import CompileError, DeviceError  # imports NumPy, which --help does without

        if isinstance(error, (DeviceError, CompileError)):
            complain(prog, error)
        elif type(error).__name__ in ("CUDARuntimeError", "CUDADriverError"):  # of CuPy, which a CPU does without
            atexit.register(_end_at_once, error)
            complain(prog, f"the GPU failed: {error}; what was saved before still stands")
        else:
            raise
    except BrokenPipeError:  # the reader of stdout has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        complain(prog, f"cannot read or write{where}: {error.strerror or error}; what was saved before still stands")
    except MemoryError as error:
        complain(prog, f"not enough memory ({error}); lower --batch-size, --seq-length, --rnn-units or --num-samples")
    return USAGE_ERROR


def _prompts(config: GenerateConfig) -> list[str]:
    from char_gru.rnn.texts import PROMPT_LIMIT, STDIN, read_text

    prompts = [read_text(STDIN, PROMPT_LIMIT) if prompt == STDIN else prompt for prompt in config.prompt]
    if config.prompt_file is not None:
        prompts.append(read_text(config.prompt_file, PROMPT_LIMIT))
    return prompts or [""]


def _print_texts(prompts: list[str], pieces: Iterator[list[str]]) -> int:
    """Write all texts to stdout, a line of dashes between two: the first text piece by piece, as it is made, the other
    texts at the end. Ctrl-C and SIGTERM end all texts where they are. Returns the exit status.
    """
    status, other_texts = 0, [[prompt] for prompt in prompts[1:]]
    _write(prompts[0])
    try:
        for first_piece, *other_pieces in pieces:
            for text, piece in zip(other_texts, other_pieces):
                text.append(piece)
            _write(first_piece)  # last, since Ctrl-C most likely comes here
    except KeyboardInterrupt as stop:
        status = status_after(stop)
    for text in other_texts:
        _write("\n" + "-" * 10 + "\n" + "".join(text))
    _write("\n")
    return status


def _write(text: str) -> None:
    sys.stdout.write(displayed(text))
    sys.stdout.flush()
