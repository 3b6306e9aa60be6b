"""LitMoE: the loss, the optimizer and the validation of a Transformer under Lightning."""

from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from moepp.model import (
    InputError,
    MoEConfig,
    Transformer,
    TransformerConfig,
    linear_cross_entropy,
    linear_distillation,
    mean_load_balance_loss,
    nll_by_token,
)
from moepp.model.config import require
from moepp.model.conversion import bias_at, set_bias
from moepp.model.sharding import ParallelConfig, shard
from moepp.training.budget import BudgetConfig, calibration_tokens
from moepp.training.checkpoint import configs_in, described, differing
from moepp.training.metrics import FINAL, VAL, Validation
from moepp.training.optimizer import AdamW, OptimConfig, by_mesh, total_norm
from moepp.training.run_folder import say
from moepp.training.start import ConvertConfig, DistillConfig, Teacher, start_from


class LitMoE(L.LightningModule):
    """A MoE++ transformer and how it is trained.

    Args:
        transformer: sizes of the transformer; its vocabulary is the data's.
        moe: experts, router and balance; every ablation is a switch here.
        optim: AdamW and its schedule.
        compile: torch.compile every block, and the loss's softmax.
        checkpoint_activations: keep the input of a block alone, and compute the rest of it again in backward: less
            memory for a third more computation.
        parallel: how many devices share what, where --trainer.strategy=fsdp2 shards the model.
        init_from: a checkpoint whose weights training starts from, instead of drawn ones. What else `model` says
            is by default what the checkpoint says.
        convert: how the experts that `moepp convert` has added are let in.
        distill: a teacher to stay close to.
        budget: how `moe.ffn_budget` is reached.
    """

    def __init__(
        self,
        transformer: TransformerConfig = TransformerConfig(),
        moe: MoEConfig = MoEConfig(),
        optim: OptimConfig = OptimConfig(),
        compile: bool = False,
        checkpoint_activations: bool = False,
        parallel: ParallelConfig = ParallelConfig(),
        init_from: str | None = None,
        convert: ConvertConfig = ConvertConfig(),
        distill: DistillConfig = DistillConfig(),
        budget: BudgetConfig = BudgetConfig(),
    ) -> None:
        super().__init__()
        self.transformer, self.moe, self.optim = transformer, moe, optim
        self.parallel = parallel
        with torch.device("meta") if parallel.sharded else nullcontext():
            self.model = Transformer(transformer, moe)
        self.model.checkpoint_activations = checkpoint_activations
        self.resumed = False  # from a checkpoint of this run
        self.init_from, self.convert, self.distill, self.budget = init_from, convert, distill, budget
        let_in = convert.steps is None or moe.score_bias
        require(let_in, "convert.steps", convert.steps, "needs experts that moepp convert has added")
        if budget.start is not None:
            moe.require_budget(budget.start, "budget.start")
        self.teacher: Teacher | None = None
        self.compile_loss = compile
        if compile:
            # of training, validation and every model of a study; with more than 8 it would go on uncompiled
            torch._dynamo.config.recompile_limit = 64
            for block in self.model.blocks:
                block.compile()
        self.gradient_norm = torch.tensor(float("nan"))
        self.config_text = ""  # every option of the run, for its checkpoints
        # a step, a batch of validation has come through: what fails later is not the checkpoint's fault
        self.training_begun = self.evaluation_begun = False
        self.calibrated_at: int | None = None  # the optimizer step after which evaluation's budget was set
        self.bad_step = torch.zeros(())  # 1: the last optimizer step was skipped

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if data.seq_len > self.transformer.context_length:
            raise InputError(
                f"data.seq_len: {data.seq_len} is longer than "
                f"model.transformer.context_length={self.transformer.context_length}"
            )

    def configure_model(self) -> None:
        """Shard it, where it was built without weights, and draw each device's part of them."""
        if str(self.trainer.precision) == "64-true":
            self.double()  # Lightning does so after it has put a checkpoint's weights into float32
        if next(self.parameters()).is_meta:
            strategy = self.trainer.strategy
            # what autocast would multiply in, matrices can be gathered in
            dtype = torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None
            self.model.seed = strategy.broadcast(self.model.seed)
            shard(self.model, self.parallel, strategy.root_device, dtype)
            self.model.materialize(strategy.root_device)

    def on_fit_start(self) -> None:
        tokenizer = self.trainer.datamodule.files.tokenizer_json  # type: ignore[attr-defined]
        if self.init_from is not None and not self.resumed:
            other = start_from(self.model, self.init_from, tokenizer)
            say(self.trainer, f"starts from {self.init_from}" + (f" with {', '.join(other)}" if other else ""))
        self.load_teacher(tokenizer)

    def load_teacher(self, tokenizer_json: str) -> None:
        """That of `distill`, if any, which must have this tokenizer."""
        if self.distill.teacher is not None:
            self.teacher = Teacher(self.distill.teacher, self.transformer, tokenizer_json)
            self.teacher.model.to(self.model.head.weight)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Let added experts in by as much as is due."""
        if self.moe.score_bias:
            steps = self.convert.steps
            if steps is None:
                steps = int(self.trainer.estimated_stepping_batches) // 5
            set_bias(self.model, bias_at(self.trainer.global_step, self.convert.start, steps))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Total loss = cross-entropy + β · mean of L_b over the layers. All but `loss` is for the monitor.

        With a teacher, distillation takes the place of `distill.weight` of the cross-entropy.
        """
        hidden_BSD, routings = self.model.hidden(batch["inputs"])
        head = hidden_BSD.flatten(0, 1), self.model.head.weight, batch["targets"].flatten()
        figures = {}
        if self.teacher is None:
            loss = cross_entropy = linear_cross_entropy(*head, compile=self.compile_loss)
        else:
            teacher, distill = self.teacher.hidden(batch["inputs"]), self.distill
            loss, cross_entropy, figures["distillation"] = linear_distillation(
                *head, *teacher, distill.weight, distill.temperature, self.compile_loss
            )
        if self.model.budget is not None:
            self.model.budget.observe(routings)
        balance = mean_load_balance_loss(routings)
        loss = loss + self.moe.balance_weight * balance
        kept = [routing.kept.float().mean() for routing in routings if routing.kept is not None]
        return {
            # a loss that is not finite makes every gradient NaN, on every device: the step will be skipped
            "loss": loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan),
            "cross_entropy": cross_entropy.detach(),
            "balance": balance.detach(),
            "ffn_assignments": torch.stack([routing.computed().sum() for routing in routings]).sum(),
            "tokens_per_expert_LE": torch.stack([routing.tokens_per_expert() for routing in routings]),
            "dropped": 1 - torch.stack(kept).mean() if kept else balance.new_zeros(()),
            **figures,
        }

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Steer the share of FFN experts by what the tokens of this step, `global_step`, took."""
        if (budget := self.model.budget) is not None:
            step, steps = self.trainer.global_step, int(self.trainer.estimated_stepping_batches)
            now, following = (self.budget.at(i, steps, budget.aim) for i in (step, step + 1))
            budget.step(now, lambda figures: self.trainer.strategy.reduce(figures, reduce_op="mean"))
            budget.spend(following)

    def on_train_end(self) -> None:
        """Set the budget of evaluation by the last training text, read again with the weights as they are now. Not
        where training was cut short: it would go on from there as another run."""
        budget, data = self.model.budget, self.trainer.datamodule  # type: ignore[attr-defined]
        step = self.trainer.global_step
        if budget is None or step < int(self.trainer.estimated_stepping_batches):
            return
        if step == self.calibrated_at:  # a run that had ended is continued
            return
        say(self.trainer, "reading the last training text again, to set the budget by it")
        self.model.eval()
        with torch.no_grad(), self.trainer.precision_plugin.forward_context():
            for batch in data.last_batches(calibration_tokens(data.tokens_seen())):
                budget.observe(self.model.hidden(batch["inputs"].to(self.device))[1])
        self.model.train()
        budget.calibrate(self.trainer.strategy.all_gather)
        self.model.set_ffn_budget(budget.aim)
        self.calibrated_at = step

    def on_validation_epoch_start(self) -> None:
        if self.model.budget is not None and self.trainer.state.fn != "fit":
            self.model.set_ffn_budget(self.model.budget.aim)
        files = self.trainer.datamodule.files  # type: ignore[attr-defined]
        self.validation = Validation(files, self.device)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        hidden_BSD, routings = self.model.hidden(batch["inputs"])
        targets_BS = batch["targets"]
        nats_N = nll_by_token(hidden_BSD.flatten(0, 1), self.model.head.weight, targets_BS.flatten())
        ffn_LT = torch.stack([routing.computed().sum(1) for routing in routings])
        self.validation.update(nats_N.view_as(targets_BS), targets_BS, batch["domain"], ffn_LT)
        self.evaluation_begun = True

    def on_validation_epoch_end(self) -> None:
        stage = VAL if self.trainer.state.fn == "fit" else FINAL
        metrics = {stage + name: figure for name, figure in self.validation.compute().items()}
        self.log_dict(metrics, logger=False)  # Lightning would log it under the step before
        if not self.trainer.sanity_checking:
            for logger in self.trainer.loggers:
                logger.log_metrics(metrics, step=self.trainer.global_step)

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    @property
    def fused(self) -> bool:
        """Whether AdamW is. fp16 needs its gradients unscaled before they are clipped, which a fused step would do
        too late."""
        return str(self.trainer.precision) != "16-mixed"

    def configure_optimizers(self) -> OptimizerLRScheduler:
        decayed: list[Tensor] = []
        others: list[Tensor] = []
        for name, parameter in self.model.named_parameters():
            matrix = parameter.dim() >= 2 and not name.endswith("constants")
            (decayed if matrix else others).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": self.optim.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        optimizer = AdamW(groups, self.optim.lr, self.optim.betas, self.optim.eps, fused=self.fused)
        total_steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.optim.lr_at(step, total_steps) / self.optim.lr
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """As Lightning clips, keeping the norm from before for the log. One that is not finite skips the step."""
        with_gradient = [parameter for parameter in self.parameters() if parameter.grad is not None]
        self.gradient_norm = total_norm([gradient for p in with_gradient if (gradient := p.grad) is not None])
        self.bad_step = (~self.gradient_norm.isfinite()).float()
        if optimizer.defaults["fused"]:  # else the gradient scaler of fp16 sees to it
            optimizer.found_inf = self.bad_step  # type: ignore[attr-defined]  # 1: AdamW does nothing, on the device
        if gradient_clip_val:
            for parameters in by_mesh(with_gradient):
                if gradient_clip_algorithm == "value":
                    torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
                else:
                    torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip_val, self.gradient_norm)

    def on_train_start(self) -> None:
        """The optimizer's state is a checkpoint's, its settings are what the options say now. So is the budget."""
        if (budget := self.model.budget) is not None:
            steps = int(self.trainer.estimated_stepping_batches)
            budget.spend(self.budget.at(self.trainer.global_step, steps, budget.aim))
        groups = self.trainer.optimizers[0].param_groups
        schedule: Any = self.trainer.lr_scheduler_configs[0].scheduler
        schedule.base_lrs = [self.optim.lr] * len(groups)
        lr = self.optim.lr * schedule.lr_lambdas[0](schedule.last_epoch)  # to the last bit as LambdaLR does
        for group, decay in zip(groups, (self.optim.weight_decay, 0.0), strict=True):
            group |= {"initial_lr": self.optim.lr, "lr": lr, "weight_decay": decay}
            group |= {"betas": self.optim.betas, "eps": self.optim.eps}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.training_begun = True

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        files = data.files
        trained_on = files.tokenizer_json, files.end_of_text, files.label, files.meta["data_hash"]
        checkpoint["moepp"] = described(self.transformer, self.moe, *trained_on, self.config_text)
        checkpoint["computed_order"] = data.computed_order
        checkpoint["calibrated_at"] = self.calibrated_at

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another shape or of another text, naming the difference; keeps its order.

        Raises:
            InputError: made with another model, tokenizer or text.
        """
        saved = checkpoint["moepp"]
        self.resumed = True
        for key, old, new in differing(configs_in(saved), (self.transformer, self.moe)):
            other_budget = key == "model.moe.ffn_budget" and None not in (old, new)
            if key.rpartition(".")[2] not in FREE_TO_CHANGE and not other_budget:
                its = f"the checkpoint's is {old}; --config with the config.yaml of its run has all of its options"
                raise InputError(f"{key}: is {new}, {its}")
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        meta = data.files.meta
        if saved["tokenizer"] != data.files.tokenizer_json:
            raise InputError(
                f"ckpt_path: was trained with another tokenizer ({saved['tokenizer_hash'][:8]}) than data.path "
                f"has ({meta['tokenizer_sha256'][:8]})"
            )
        same = saved["data_hash"] == meta["data_hash"]
        if self.trainer.state.fn == "fit" and not same and not data.allow_other_text:
            raise InputError(
                f"data.path: {data.files.label} is not what the checkpoint was trained on, {saved['data']}; "
                "start a new run, or say --data.allow_other_text=true to go on with it"
            )
        data.computed_order = bool(checkpoint.get("computed_order"))  # an older run keeps its order
        self.calibrated_at = checkpoint.get("calibrated_at")
        for state in checkpoint.get("optimizer_states", ()):
            for group in state["param_groups"]:
                group["fused"] = self.fused  # the checkpoint's precision may be another


# what a resumed run may set anew: none of it changes the shape or the meaning of a weight
FREE_TO_CHANGE = {
    "balance_weight",
    "balance_groups",
    "balance_over",
    "capacity_factor",
    "tau",
    "context_length",
    "init_std",
}
