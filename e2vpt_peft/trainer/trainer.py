"""The paper's recipe on transformers' Trainer."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import enable_full_determinism, set_seed
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from ..adapter import PromptedAdapter
from ..config import E2VPTConfig
from ..model_card.write import README
from ..pruning import AdapterSnapshot, InitialValues, PromptScores, rewind_prompts, score_prompts
from ..pruning.rewind import has_initial_prompts
from ..pruning.snapshot import copy_trained
from ..utils.files import whole_files, write_atomically
from ..utils.non_finite import explain_non_finite, is_finite
from ..utils.shards import refuse_shards
from .config import PruningArguments, PruningConfig
from .model_card import ModelCardTrainer, results_in
from .search import Candidate, choose, list_candidates, plan_rounds, search
from .state import SearchState, on_main_process

logger = logging.getLogger(__name__)

RESULTS, PLOT = "pruning_results.json", "pruning_results.png"
# What results depend on, with the PruningConfig: a search is resumed with the same ones only.
ARGUMENTS = (
    "seed",
    "data_seed",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "weight_decay",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
)
ADAPTER_SETTINGS = (
    "num_visual_prompts",
    "visual_prompt_depth",
    "num_kv_prompts",
    "share_kv_prompts",
    "init_weights",
    "num_segments",
)


class _Table(list):
    """The rows of results, which `Trainer.log_metrics` prints as their number."""

    def __str__(self) -> str:
        return f"{len(self)} rows, in {RESULTS}"

    def __format__(self, specification: str) -> str:
        return format(str(self), specification)


class E2VPTTrainer(ModelCardTrainer):
    """A Trainer that finds out which visual prompts are worth their place.

    [`train`] tunes the adapter, scores its visual prompts and their segments on the training data, and tries to prune
    them at the rates of a [`PruningConfig`]: each candidate is pruned, rewound to its initial values and trained
    again, with the same arguments and the same seed. The one with the best validation metric is left in the model,
    ties go to the one with fewer parameters. If all are worse than the unpruned adapter by more than the tolerance,
    that one is left instead.

    The winner's own weights are kept: trained anew with the same data and seed, it would come out the same. With
    `final_train_dataset` it is rewound and trained once more, on that.

    The adapter that it saves or pushes has a model card with all that the search found out, see [`ModelCardTrainer`].

    Every phase is a training of its own, with the callbacks, the evaluation and the checkpoints that the
    [`~transformers.TrainingArguments`] ask for. All that it writes into the output directory is `_pruning_state/`,
    `pruning_results.json` and, if matplotlib is installed, `pruning_results.png`.

    Args:
        *args, **kwargs: Those of [`~transformers.Trainer`]. `eval_dataset` is needed.
        pruning_config ([`PruningConfig`] or [`PruningArguments`], *optional*): The search. Defaults to the paper's.
        final_train_dataset (`torch.utils.data.Dataset`, *optional*):
            What the winner is trained on at last, for example the training and validation data together, as in the
            paper. The metric cannot judge that training, so the tolerance holds before it.

    Example:

        ```py
        >>> trainer = E2VPTTrainer(
        ...     model=get_peft_model(vit, E2VPTConfig(modules_to_save=["classifier"])),
        ...     args=TrainingArguments("out", num_train_epochs=20, learning_rate=1e-2),
        ...     train_dataset=train,
        ...     eval_dataset=validation,
        ...     compute_metrics=accuracy,
        ...     pruning_config=PruningConfig(search="halving", metric_for_best_model="accuracy"),
        ... )
        >>> trainer.train()
        ```
    """

    def __init__(
        self,
        *args: Any,
        pruning_config: Optional[PruningArguments] = None,
        final_train_dataset: Optional[Dataset] = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.pruning_config = PruningConfig(**({} if pruning_config is None else dataclasses.asdict(pruning_config)))
        self.final_train_dataset = final_train_dataset
        # What Trainer asks whether the model is in shards, which it is in phases only.
        self._engines = {name: getattr(self, name) for name in ("is_fsdp_enabled", "is_deepspeed_enabled")}
        self._use_engines(False)

    def train(
        self,
        resume_from_checkpoint: Optional[str | bool] = None,
        trial: Any = None,
        ignore_keys_for_eval: Optional[list[str]] = None,
    ) -> TrainOutput:
        """Run the whole search.

        Args:
            resume_from_checkpoint (`bool`, *optional*):
                `True` goes on with the search in the output directory, wherever it was killed, and starts one if
                there is none. The result is that of an uninterrupted run.
            trial: Not supported.
            ignore_keys_for_eval (`list[str]`, *optional*): As for [`~transformers.Trainer.train`].

        Returns:
            [`~transformers.trainer_utils.TrainOutput`]: Steps of all phases together, the training loss of the
            winner, and metrics, with the table of candidates as `"pruning_candidates"`.

        Raises:
            ValueError: Something needed is missing or does not go together. Nothing has been trained.
            FloatingPointError: A loss is NaN or infinite; see `PruningConfig(skip_diverged=True)` for candidates.
        """
        start_time = time.time()
        adapter_name, adapter_config = self._check_setup(resume_from_checkpoint, trial)
        metric, greater_is_better = self._metric()
        arguments, train_dataset = self.args, self.train_dataset
        callbacks = [c for c in self.callback_handler.callbacks if isinstance(c, ExportableState)]
        # Callbacks that count (early stopping) begin anew in every phase.
        self._callback_states = [(c, copy.deepcopy(c.state()["attributes"])) for c in callbacks]
        self._log_history: list[dict[str, Any]] = []
        self._ignore_keys = ignore_keys_for_eval
        self._adapter_name, self._metric_name = adapter_name, metric
        settings = {
            **{name: getattr(arguments, name) for name in ARGUMENTS},
            **{name: getattr(adapter_config, name) for name in ADAPTER_SETTINGS},
            **dataclasses.asdict(self.pruning_config),
            "metric_for_best_model": metric,
            "greater_is_better": greater_is_better,
            "final_training": self.final_train_dataset is not None,
        }
        try:
            self._log(phase="start")  # reporters open their files now, in the user's output directory
            resume = bool(resume_from_checkpoint) and SearchState.exists(str(arguments.output_dir))
            if not resume:
                self._check_metric(self.evaluate(ignore_keys=ignore_keys_for_eval))
            self._search_state = SearchState(str(arguments.output_dir), settings, resume)
            return self._run(greater_is_better, start_time)
        finally:
            self.args, self.train_dataset = arguments, train_dataset
            self._release()

    def _run(self, greater_is_better: bool, start_time: float) -> TrainOutput:
        config, name, state = self.pruning_config, self._adapter_name, self._search_state
        model: Any = self.model
        adapter = PromptedAdapter.find(model, name)
        if not {"initial", "start"} <= state.records.keys():
            state.finish("initial", {}, InitialValues.of(adapter).values)
            state.finish("start", {}, AdapterSnapshot.of(adapter).to_tensors())
        initial = InitialValues(state.tensors("initial"))
        start = AdapterSnapshot.from_tensors(state.tensors("start"))
        initial.restore(adapter)

        def rewind(candidate: Candidate) -> None:
            start.restore(adapter)  # undoes what was pruned since
            initial.restore(adapter)
            if config.rewind == "fresh":
                set_seed(self.args.seed + 1)  # the same new values for every candidate
            rewind_prompts(model, init=config.rewind, adapter_name=name)  # type: ignore[arg-type]
            adapter.set_masks(candidate.masks)

        full = self.args.max_steps if self.args.max_steps > 0 else self.args.num_train_epochs
        self._train_phase("tune", full, full, lambda: start.restore(adapter))
        AdapterSnapshot.from_tensors(state.tensors("tune")).restore(adapter)
        reference, candidates = list_candidates(adapter, self._scores(), config)
        reference.metric, reference.epochs, reference.phase = self._outcome("tune")
        self._log_summary("tune", reference)

        rounds = plan_rounds(config, len(candidates), full)
        quiet = self.args.disable_tqdm or not self.is_local_process_zero()
        progress = tqdm(total=sum(count for count, _ in rounds), desc="Pruning candidates", disable=quiet)

        def train(candidate: Candidate, length: float) -> None:
            phase = candidate.name if length == full else f"{candidate.name}-{length:g}"
            self._train_phase(phase, length, full, lambda: rewind(candidate))
            candidate.metric, epochs, candidate.phase = self._outcome(phase)
            candidate.epochs += epochs
            self._log_summary(phase, candidate)
            progress.update()

        finalists = search(candidates, rounds, train, greater_is_better)
        progress.close()
        best = choose(reference, finalists, greater_is_better, config.tolerance)
        assert best.phase is not None
        phase = best.phase
        if self.final_train_dataset is not None:
            phase = "final"
            self.train_dataset = self.final_train_dataset
            self._train_phase(phase, full, full, lambda: rewind(best))
        initial.restore(adapter)
        if phase != "tune":
            rewind(best)  # what the winner started from is what rewinding it by hand goes back to
        AdapterSnapshot.from_tensors(state.tensors(phase)).restore(adapter)
        return self._report(reference, candidates, best, phase, start_time)

    def _train_phase(self, phase: str, length: float, full: float, prepare: Callable[[], None]) -> None:
        """Train the adapter that `prepare` makes, unless that has been done; for `length` epochs, or steps."""
        state = self._search_state
        if phase in state.records:
            return
        logger.info("Pruning: phase %s", phase)
        user_args, checkpoint = self.args, None
        if isinstance(self.model, PeftModel):  # Trainer resumes adapters of no other kind
            checkpoint = state.last_checkpoint(phase)
        args = copy.copy(user_args)
        args.output_dir = str(state.phase_folder(phase))
        args.push_to_hub = False  # what is worth it, the user pushes at the end
        if args.max_steps > 0:
            args.max_steps = int(length)
        else:
            args.num_train_epochs = length
        if args.warmup_steps >= 1:
            args.warmup_steps = int(args.warmup_steps * length / full)
        prepare()
        self.args, self._phase = args, phase
        try:
            self._begin(args.seed, args.full_determinism)
            with self._shards():
                output = super().train(resume_from_checkpoint=checkpoint, ignore_keys_for_eval=self._ignore_keys)
            self._check_weights()
            metrics = self.evaluate(ignore_keys=self._ignore_keys)
        except FloatingPointError as error:
            if not (self.pruning_config.skip_diverged and phase.startswith("candidate")):
                raise
            logger.warning("%s The candidate is skipped.", error)
            output = TrainOutput(self.state.global_step, math.nan, {})
            metrics = {self._metric_name: math.nan}
        finally:
            self.args = user_args
        self._check_metric(metrics)
        record = {
            "metric": float(metrics[self._metric_name]),
            "epochs": float(self.state.epoch or 0),
            "steps": self.state.global_step,
            "train_loss": output.training_loss,
        }
        model: Any = self.model
        state.finish(phase, record, AdapterSnapshot.of(PromptedAdapter.find(model, self._adapter_name)).to_tensors())

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """As [`~transformers.Trainer.training_step`], but refuses a loss that is NaN or infinite.

        Raises:
            FloatingPointError: It is. The message has the phase, the step and the likely cause; the weights are those
            of the step before.
        """
        loss = super().training_step(model, inputs, *args, **kwargs)
        finite = loss.isfinite().all()
        if self.args.world_size > 1:  # all stop, or none
            finite = self.accelerator.reduce(finite.float(), "mean") == 1
        if not finite:
            raise FloatingPointError(
                f"The loss of phase '{self._phase}' is {loss.mean().item()} at step {self.state.global_step + 1}. "
                f"{explain_non_finite(model, inputs)}"
            )
        return loss

    @contextmanager
    def _shards(self) -> Iterator[None]:
        """FSDP and DeepSpeed are given a copy of the model, which they take apart; what it learns comes back.

        Pruning makes parameters of other sizes, and neither engine can change those that it has.
        """
        whole: Any = self.model
        if not any(self._engines.values()):
            yield
            return
        self.model = self.model_wrapped = copy.deepcopy(whole.cpu())
        self._use_engines(True)
        try:
            yield
            copy_trained(self.model, PromptedAdapter.find(whole, self._adapter_name))
        finally:
            self._use_engines(False)
            self.accelerator.free_memory()  # DeepSpeed's engine, too
            self.deepspeed = None
            self.model = self.callback_handler.model = whole
            self._release()

    def _use_engines(self, used: bool) -> None:
        for name, is_there in self._engines.items():
            setattr(self, name, used and is_there)

    def _place_whole_model(self) -> None:
        """Trainer does not put a model on the device if there is an engine to do so."""
        model: Any = self.model
        if any(self._engines.values()) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            model.to(self.args.device)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As [`~transformers.Trainer.evaluation_loop`]; between phases, of the whole model."""
        self._place_whole_model()
        return super().evaluation_loop(*args, **kwargs)

    def _check_weights(self) -> None:
        """The last update of a phase may be the one that overflows, and a metric need not show it."""
        model: Any = self.model
        spoilt = [name for name, parameter in model.named_parameters() if not is_finite(parameter)]
        if spoilt:
            raise FloatingPointError(
                f"'{spoilt[0]}' is NaN or infinite after the last step of phase '{self._phase}' "
                f"({self.state.global_step}): try a lower learning rate, or gradient clipping (max_grad_norm)."
            )

    def _save(self, output_dir: Optional[str] = None, state_dict: Optional[dict[str, Any]] = None) -> None:
        if not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        with whole_files(Path(str(self.args.output_dir if output_dir is None else output_dir)), [README]) as folder:
            super()._save(str(folder), state_dict)

    def _begin(self, seed: int, full_determinism: bool) -> None:
        """Make the Trainer forget the last phase: its optimizer, its wrappers, what callbacks counted, randomness."""
        self._log_history += self.state.log_history
        self.state.log_history = []
        self._release()
        for callback, attributes in self._callback_states:
            for name, value in copy.deepcopy(attributes).items():
                setattr(callback, name, value)
        if full_determinism:
            enable_full_determinism(seed)
        else:
            set_seed(seed)

    def _release(self) -> None:
        """Let go of what belongs to the parameters there were, since pruning makes new ones. Trainer frees it."""
        self.optimizer = self.lr_scheduler = None
        # Takes mixed precision off the forward method, which would be wrapped once more in every phase.
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        # An evaluation marks the model as prepared, and Accelerate would not prepare it for training any more: several
        # processes would train without exchanging gradients.
        model._is_accelerate_prepared = False
        self.model_wrapped = model

    def _scores(self) -> PromptScores:
        state, config = self._search_state, self.pruning_config
        if "scores" not in state.records:
            set_seed(self.args.seed)
            model: Any = self.model
            dataset: Any = self.train_dataset
            self._place_whole_model()
            with self.accelerator.autocast():
                scores = score_prompts(
                    model,
                    self.get_test_dataloader(dataset),  # in order, as for evaluation
                    config.importance,
                    adapter_name=self._adapter_name,
                    max_batches=config.max_score_batches,
                    progress_bar=not self.args.disable_tqdm and self.is_local_process_zero(),
                )
            state.finish("scores", {}, {"tokens": scores.tokens, "segments": scores.segments.contiguous()})
            self._log(phase="score", visual_prompts=len(scores.tokens))
        saved = state.tensors("scores")
        return PromptScores(saved["tokens"], saved["segments"], config.importance)

    def _outcome(self, phase: str) -> tuple[float, float, str]:
        record = self._search_state.records[phase]
        return record["metric"], record["epochs"], phase

    def _log_summary(self, phase: str, candidate: Candidate, **more: Any) -> None:
        row = candidate.row()
        kept = {name: row[name] for name in ("segments", "parameters")}
        self._log(phase=phase, visual_prompts=row["tokens"], **kept, **{self._metric_name: candidate.metric}, **more)

    def _log(self, **logs: Any) -> None:
        self.log(logs)

    def _report(
        self, reference: Candidate, candidates: list[Candidate], best: Candidate, phase: str, start_time: float
    ) -> TrainOutput:
        records = self._search_state.records
        trained = [record for record in records.values() if "steps" in record]
        metric = f"{self._metric_name}={best.metric:.6g}"
        if best is reference:
            message = f"Nothing was pruned: no candidate came within tolerance={self.pruning_config.tolerance:g} of "
            message += f"the unpruned adapter's {metric}."
        else:
            message = f"Kept {best.masks.num_tokens} of {reference.masks.num_tokens} visual prompts and "
            message += f"{best.parameters:,} of {reference.parameters:,} parameters ({best.name}): {metric}, "
            message += f"unpruned {reference.metric:.6g}."
        rows = [candidate.row() for candidate in [reference, *candidates]]
        results = {
            "message": message,
            "metric": self._metric_name,
            "best": best.name,
            "final_phase": phase,
            "epochs": sum(record["epochs"] for record in trained),
            "candidates": rows,
        }
        on_main_process(lambda: self._write_results(results))
        logger.log(logging.WARNING if best is reference else logging.INFO, message)
        self._log_summary("done", best, message=message)
        self.state.log_history = self._log_history + self.state.log_history
        metrics: dict[str, Any] = {
            "train_runtime": round(time.time() - start_time, 4),
            "train_loss": records[phase]["train_loss"],
            "pruning_metric": best.metric,
            "pruning_metric_unpruned": reference.metric,
            "pruning_visual_prompts": best.masks.num_tokens,
            "pruning_parameters": best.parameters,
            "pruning_epochs": results["epochs"],
            "pruning_message": message,
            "pruning_candidates": _Table(rows),
        }
        return TrainOutput(sum(record["steps"] for record in trained), records[phase]["train_loss"], metrics)

    def _write_results(self, results: dict[str, Any]) -> None:
        folder = Path(str(self.args.output_dir))
        write_atomically(folder / RESULTS, json.dumps(results, indent=2).encode())
        if importlib.util.find_spec("matplotlib") is not None:
            from ..plots import plot_candidates

            plot_candidates(results).savefig(folder / PLOT, dpi=150)

    def _card_metrics(self) -> dict[str, float]:
        history: list[Any] = self.state.log_history
        done = [index for index, entry in enumerate(history) if entry.get("phase") == "done"]
        if not done:
            return super()._card_metrics()
        # What comes before are the results of other candidates, and the metric that decided is of weights that a
        # final training has replaced.
        return results_in(history[done[-1] + (self.final_train_dataset is not None) :])

    def _card_pruning(self) -> Optional[str]:
        history: list[Any] = self.state.log_history
        messages = [entry["message"] for entry in history if entry.get("phase") == "done"]
        if not messages:
            return None
        config = self.pruning_config
        tokens, segments = (
            ", ".join(f"{rate:g}" for rate in rates) for rates in (config.token_rates, config.segment_rates)
        )
        return (
            f"Prompts were scored by their importance `{config.importance}` and pruned at rates of {tokens} (visual "
            f"prompts) and {segments} (segments); each candidate was rewound and trained again (`{config.search}` "
            f"search). {messages[-1]}"
        )

    def _metric(self) -> tuple[str, bool]:
        """The name of the metric that decides, and whether larger is better."""
        config, args = self.pruning_config, self.args
        metric = config.metric_for_best_model or args.metric_for_best_model or "loss"
        greater_is_better = config.greater_is_better
        if greater_is_better is None and metric == args.metric_for_best_model:
            greater_is_better = args.greater_is_better
        if greater_is_better is None:
            greater_is_better = not metric.endswith("loss")
        return metric if metric.startswith("eval_") else f"eval_{metric}", greater_is_better

    def _check_metric(self, metrics: dict[str, float]) -> None:
        if self._metric_name not in metrics:
            raise ValueError(
                f"metric_for_best_model={self._metric_name!r} is not among the metrics of the evaluation: "
                f"{', '.join(sorted(metrics))}. Name one of them, or return it from compute_metrics."
            )

    def _check_setup(self, resume_from_checkpoint: Any, trial: Any) -> tuple[str, E2VPTConfig]:
        """Refuse in words what cannot work, and return the name and the configuration of the adapter."""
        if not (resume_from_checkpoint is None or isinstance(resume_from_checkpoint, bool)):
            raise ValueError(
                f"resume_from_checkpoint={resume_from_checkpoint!r} must be True or False: a search is resumed from "
                "the output_dir that it was started with, not from a single checkpoint."
            )
        if trial is not None or self.model_init is not None:
            raise ValueError("E2VPTTrainer takes a model, not model_init: rewinding needs one model throughout.")
        for name, dataset in (("train_dataset", self.train_dataset), ("eval_dataset", self.eval_dataset)):
            if dataset is None:
                raise ValueError(f"{name}=None, but the search needs it: pass {name} to E2VPTTrainer.")
        if self.optimizer is not None or self.lr_scheduler is not None:
            raise ValueError(
                "optimizers=... belong to parameters that pruning replaces. Choose the optimizer by "
                "TrainingArguments(optim=...), pass optimizer_cls_and_kwargs, or override create_optimizer."
            )
        self._check_engines()
        model: Any = self.model
        refuse_shards(model)
        try:
            adapter = PromptedAdapter.find(model)
            adapter.require_visual_prompts()
        except ValueError as error:
            raise ValueError(f"E2VPTTrainer needs one active adapter with visual prompts. {error}") from None
        known = has_initial_prompts(adapter)
        if self.pruning_config.rewind == "saved" and not known and not resume_from_checkpoint:
            raise ValueError(
                f"rewind='saved', but the initial values of adapter '{adapter.name}' are not known, because it was "
                "loaded from a file: set PruningConfig(rewind='fresh')."
            )
        return adapter.name, adapter.config

    def _check_engines(self) -> None:
        state = self.accelerator.state
        if self._engines["is_fsdp_enabled"]:
            plugin = state.fsdp_plugin
            if (
                plugin.fsdp_version != 2
                or "FULL" not in str(plugin.state_dict_type)
                or plugin.cpu_ram_efficient_loading
            ):
                raise ValueError(
                    "E2VPTTrainer needs FSDP with fsdp_version: 2, fsdp_state_dict_type: FULL_STATE_DICT and "
                    "fsdp_cpu_ram_efficient_loading: false, as in examples/accelerate/fsdp2.yaml."
                )
        if self._engines["is_deepspeed_enabled"] and "scheduler" in state.deepspeed_plugin.deepspeed_config:
            raise ValueError(
                "E2VPTTrainer has trainings of different lengths, for which DeepSpeed's scheduler is not made anew: "
                "take 'scheduler' out of the DeepSpeed config, and use TrainingArguments(lr_scheduler_type=...)."
            )
