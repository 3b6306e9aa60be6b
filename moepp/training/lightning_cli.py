"""`moepp fit | validate | test`: LightningCLI with OmegaConf recipes, a folder per run, one-line errors."""

import json
import re
import sys
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
import yaml
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf.errors import OmegaConfBaseException

from moepp.model import InputError, count_parameters
from moepp.model.config import require
from moepp.system.machine import default_precision, device_name, keep_freed_memory, quiet_lightning
from moepp.text.data_module import TokenDataModule
from moepp.text.tokenizer import padded_vocab_size
from moepp.training.arguments import NO_OPTIONS, OneLineParser, expand_bases, expand_last, naming_recipe
from moepp.training.bad_steps import BadSteps
from moepp.training.checkpoint import CheckpointFiles, naming_checkpoint, read_rest
from moepp.training.csv_log import CSVLog
from moepp.training.devices import is_sharded, naming_lost_device, spare_copies, strategy_of
from moepp.training.module import LitMoE
from moepp.training.monitor import Monitor
from moepp.training.option_names import SECTIONS
from moepp.training.run_folder import RunFolder, recipe_name, say
from moepp.training.saving import Checkpoints, FitLoop
from moepp.training.start import described_in
from moepp.training.summary import Summary

TRAINER_DEFAULTS = {
    "max_epochs": -1,  # max_steps decides
    "max_steps": 1000,
    "check_val_every_n_epoch": None,  # val_check_interval counts batches, across epochs
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "use_distributed_sampler": False,  # TokenDataModule gives every rank its share itself
}
REFUSED = {  # what Lightning takes, and a run of ours cannot do
    "barebones": "leaves out the loggers, checkpoints and callbacks that a run consists of",
    "limit_predict_batches": "there is nothing to predict: moepp generate writes text",
    "use_distributed_sampler": "every device gets its share of the text already",
}
# Lightning's Timer has an option that YAML does not know
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, value: dumper.represent_str(str(value.value)))
PARSER = {"parser_mode": "omegaconf+", "allow_abbrev": False}  # an option cut short is a mistake


def run(verb: str, arguments: list[str]) -> None:
    """Do what the command line says."""
    parse(MoECLI, verb, arguments)


def resolve(arguments: list[str]) -> dict[str, Any]:
    """All options that `moepp fit` would run with, checked, as config.yaml has them; nothing is trained.

    Raises:
        InputError: an option is unknown, of another type or impossible.
    """
    cli = parse(OptionsAlone, "fit", arguments)
    return yaml.safe_load(cli.parser.dump(cli.config, skip_none=False))


def parse(cli: type["MoECLI"], verb: str, arguments: list[str]) -> "MoECLI":
    quiet_lightning()
    cli.verb = verb
    arguments = expand_bases(arguments)
    recipes = [Path(value) for flag, value in pairwise(arguments) if flag == "--config"]
    cli.recipe = recipe_name(recipes[-1]) if recipes else "default"
    arguments = expand_last(arguments, cli.recipe)
    try:
        return cli(
            LitMoE,
            TokenDataModule,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_class=OneLineParser,
            parser_kwargs=PARSER | {"prog": f"moepp {verb}"},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=arguments,
            run=False,  # its own verbs would be parsed twice
        )
    except InputError as error:
        raise InputError(naming_recipe(str(error), arguments)) from error
    except (OmegaConfBaseException, MisconfigurationException) as error:
        raise InputError(str(error).splitlines()[0]) from error
    except (ValueError, RuntimeError) as error:  # of a logger or callback whose package or metric is not there
        if (missing := re.search(r"Requirement '.*|Early stopping conditioned on .*", str(error))) is None:
            raise
        raise InputError(missing[0]) from error


class MoECLI(LightningCLI):
    verb = "fit"
    recipe = "default"  # names the folder of a run
    parsers: ClassVar[dict[str, LightningArgumentParser]] = {}  # by verb
    checkpoints: Checkpoints | None = None  # None: the run writes none
    why_precision = ""  # where nobody said which

    def setup_parser(self, *arguments: Any) -> None:
        """A parser takes as long to build as to parse with, and a study resolves the options of many runs: it is
        used again, unless a parse has failed, which leaves traces in it."""
        if self.verb in self.parsers:
            self.parser = self.parsers.pop(self.verb)
        else:
            super().setup_parser(*arguments)

    def after_instantiate_classes(self) -> None:
        getattr(self, self.verb)(self.config.ckpt_path)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--base", type=str | None, help="in a recipe: the recipe that it changes")
        parser.add_argument("--ckpt_path", type=str | None, help="the checkpoint to go on from, or to evaluate")
        parser.add_class_arguments(Checkpoints, "checkpoints", instantiate=False)
        sources = "data.vocab_size", "model.init_from", "ckpt_path"
        parser.link_arguments(sources, "model.transformer.vocab_size", compute_fn=model_vocab_size)
        parser.link_arguments("trainer", "model.parallel.sharded", compute_fn=is_sharded)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """What a run does not say of its model is what the checkpoint says that it starts from."""
        super().parse_arguments(parser, args)
        require_seed(self.config.seed_everything)
        require_sections(self.config)
        init_from = self.config.model.init_from
        if init_from is not None and self.config.ckpt_path is None:  # a resumed run has its own options
            described = described_in(init_from)
            before = [f"--data.vocab_size={described['transformer'].pop('vocab_size')}"]
            before += [f"--model.{part}={json.dumps(fields)}" for part, fields in described.items()]
            super().parse_arguments(parser, [*before, *args])
        self.parsers[self.verb] = parser

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Fill in what depends on the machine and the run: precision, folder, loggers, callbacks."""
        config = self.config_init.trainer
        self.begun_step = self.read_begun_step()
        if config["precision"] is None:
            on_gpu = torch.cuda.is_available() and config["accelerator"] != "cpu"
            config["precision"] = default_precision(torch.device("cuda" if on_gpu else "cpu"))
            if config["precision"] == "bf16-mixed":
                self.why_precision = " (it multiplies bf16 faster; --trainer.precision=32-true for float32)"
        if config["accelerator"] == "auto" and not torch.cuda.is_available():
            config["accelerator"] = "cpu"  # Apple's MPS has no float64, which bits per byte is summed in
        self.require_possible(config)
        kwargs["strategy"] = strategy_of(config["strategy"])
        kwargs["plugins"] = [CheckpointFiles(), *as_list(config["plugins"])]
        if is_sharded(config):
            kwargs["inference_mode"] = False  # what is gathered in it could not be used in training
        if config["enable_progress_bar"] is None:
            config["enable_progress_bar"] = sys.stdout.isatty()
        if self.verb != "fit":
            # a recipe's limit is for the validations amid training
            return super().instantiate_trainer(logger=False, limit_val_batches=1.0, **kwargs)
        self.run_folder = RunFolder(self.recipe, config["default_root_dir"], self.config.ckpt_path)
        try:
            return super().instantiate_trainer(**self.observers(config), **kwargs)
        except (MisconfigurationException, ValueError, TypeError, ModuleNotFoundError) as error:
            self.run_folder.forget()
            if isinstance(error, InputError):
                raise
            raise InputError(f"trainer: {str(error).splitlines()[0]}") from error

    def require_possible(self, config: Any) -> None:
        """Raise an InputError for what Lightning takes, but a run of ours cannot be trained with."""
        if config["max_steps"] == config["max_epochs"] == -1:
            raise InputError(
                "trainer.max_steps: say when to stop, with max_steps or max_epochs: the learning rate's schedule "
                "has to know (max_time may stop it earlier)"
            )
        for name in ("log_every_n_steps", "accumulate_grad_batches"):
            require((config[name] or 0) >= 1, f"trainer.{name}", config[name], "must be at least 1")
        for option, why in REFUSED.items():
            if config[option]:
                raise InputError(f"trainer.{option}: {why}")
        if str(config["precision"]) == "16-true":
            raise InputError("trainer.precision: in 16-true AdamW's eps is 0: take 16-mixed or bf16-true")
        every, accumulate = config["val_check_interval"], config["accumulate_grad_batches"]
        # a part of an epoch (all of it ends with a step) and a time end at any batch
        amid_a_step = every % accumulate if isinstance(every, int) else every not in (1.0, None)
        if accumulate > 1 and amid_a_step:
            raise InputError(
                f"trainer.val_check_interval: {every} can end amid a step, where no checkpoint can be written: "
                f"take a number of batches that is a multiple of accumulate_grad_batches={accumulate}"
            )

    def observers(self, config: Any) -> dict[str, Any]:
        """The run's folder, and the loggers, callbacks and way to write checkpoints that fill it."""
        loggers, run_dir = config["logger"], self.run_folder.path
        if loggers is None:
            # of what an earlier process logged, TensorBoard is to forget what this one will log again
            purge = self.begun_step + 1 if self.begun_step and (run_dir / "metrics.csv").exists() else None
            tensorboard = TensorBoardLogger(run_dir, name="", version="tensorboard", purge_step=purge)
            loggers = [CSVLog(run_dir, self.begun_step), tensorboard]
        bad_steps = BadSteps()
        monitor = Monitor(bad_steps)
        callbacks: list[L.Callback] = [self.run_folder, bad_steps, monitor, Summary(monitor)]
        if config["enable_checkpointing"] is not False and not config["fast_dev_run"]:
            self.checkpoints = Checkpoints(**self.config_init.checkpoints)
            callbacks.append(self.checkpoints)
        given = as_list(config["callbacks"])
        own_bar = any(isinstance(callback, ProgressBar) for callback in given)
        if config["enable_progress_bar"] and not own_bar:
            callbacks.append(RichProgressBar(refresh_rate=10))
        return {
            "default_root_dir": str(run_dir),
            "logger": loggers,
            "callbacks": [*callbacks, *given],
            "enable_progress_bar": config["enable_progress_bar"] or own_bar,
        }

    def read_begun_step(self) -> int:
        """The step of the checkpoint that `--ckpt_path` names, which is checked before anything is made.

        Raises:
            InputError: it was imported, or belongs to a finished study, and holds weights alone.
        """
        path = self.config.ckpt_path
        if path is None:
            return 0
        checkpoint = read_rest(path)
        state = ("optimizer_states", "lr_schedulers", "loops") if self.verb == "fit" else ()
        for key in ("pytorch-lightning_version", "global_step", *state):
            if key not in checkpoint:
                raise InputError(f"ckpt_path: {path} has no {key}: it was not kept to be used this way")
        return checkpoint["global_step"]

    def fit(self, ckpt_path: str | None) -> None:
        """Train, then validate on all held-out text."""
        config, model, data = self.config_init.trainer, self.model, self.datamodule
        try:
            model.parallel.require_fits(model.transformer, model.moe, self.trainer.world_size)
            model.resumed = ckpt_path is not None  # sharded, it would learn that after looking for its `init_from`
            model.config_text = self.config_text()
            self.run_folder.save_config(self.trainer, model.config_text)
            self.announce(model)
            if self.begun_step >= config["max_steps"] > 0:
                done = f"finished at step {self.begun_step} already"
                say(self.trainer, f"{done}: a larger --trainer.max_steps goes on")
            elif ckpt_path is not None:
                say(self.trainer, f"goes on after step {self.begun_step}, from {ckpt_path}")
            keep_freed_memory(self.trainer.strategy.root_device)
            spare_copies(self.trainer.strategy)
            self.trainer.fit_loop.__class__ = FitLoop
            naming = naming_checkpoint(ckpt_path, "continued", lambda: model.training_begun)
            with naming, naming_lost_device(self.trainer.strategy):
                self.trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
            with naming_lost_device(self.trainer.strategy):
                if self.trainer.state.finished and not config["fast_dev_run"]:
                    if self.checkpoints is not None:
                        self.checkpoints.save(self.trainer)
                    self.trainer.limit_val_batches = 1.0
                    self.trainer.validate(model, datamodule=data, verbose=False)
        except (InputError, MisconfigurationException, ModuleNotFoundError, OSError):
            self.run_folder.forget()
            raise

    def validate(self, ckpt_path: str | None) -> None:
        """Print the metrics of a checkpoint on the held-out text."""
        if ckpt_path is None:
            raise InputError("ckpt_path: name the checkpoint, for example runs/moepp/1/checkpoints/best.ckpt")
        model, data = self.model, self.datamodule
        model.parallel.require_fits(model.transformer, model.moe, self.trainer.world_size)
        naming = naming_checkpoint(ckpt_path, "evaluated", lambda: model.evaluation_begun)
        with naming, naming_lost_device(self.trainer.strategy):
            evaluate = getattr(self.trainer, self.verb)
            # weights only: a checkpoint from elsewhere must not run code
            evaluate(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True, verbose=False)
        for name, value in self.trainer.callback_metrics.items() if self.trainer.is_global_zero else ():
            print(f"{name:<40} {value:.4f}")

    test = validate

    def config_text(self) -> str:
        """All options, resolved: as a recipe they give this run again."""
        config = self.config.clone()
        config.base = config.config = None  # nothing is left to look up
        config.ckpt_path = config.trainer.default_root_dir = None  # where it began, not what it is
        return self.parser.dump(config, skip_none=False)

    def announce(self, model: LitMoE) -> None:
        parameters = count_parameters(model.transformer, model.moe)
        active = parameters.active(model.moe.expected_ffn_per_token)
        sizes = f"{parameters.total / 1e6:.1f}M parameters, about {active / 1e6:.1f}M active per token"
        machine = f"{self.trainer.precision} on {device_name(self.trainer.strategy.root_device)}"
        say(self.trainer, f"{self.trainer.default_root_dir}: {sizes}, {machine}{self.why_precision}")


class OptionsAlone(MoECLI):
    """Parses and checks, and neither seeds, builds nor runs anything."""

    def _set_seed(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass

    def after_instantiate_classes(self) -> None:
        pass


def model_vocab_size(of_data: int, init_from: str | None, ckpt_path: str | None) -> int:
    """What the data needs, or that of the checkpoint which the model starts from (resumed, it may be gone)."""
    if init_from is None:
        return padded_vocab_size(of_data)
    return described_in(ckpt_path or init_from)["transformer"]["vocab_size"]


def require_seed(seed: Any) -> None:
    """Raise an InputError for what is no seed; true and false are for Lightning to take."""
    if not isinstance(seed, bool) and (seed is None or not 0 <= seed < 2**32):
        raise InputError(f"seed_everything: must be at least 0 and below 2^32, got {seed}")


def as_list(value: Any) -> list[Any]:
    """Of what Lightning takes one of, several of, or none."""
    return [] if value is None else list(value) if isinstance(value, list | tuple) else [value]


def require_sections(options: Any) -> None:
    """Raise an InputError for a section without options, such as `data:` alone: the parser lets it pass."""
    for name in SECTIONS:
        if not hasattr(section := options[name], "items"):
            raise InputError(f"{name}: {NO_OPTIONS.format(section)}")
