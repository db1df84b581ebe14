"""The paper's recipe on transformers' Trainer."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import Dataset
from transformers import TrainingArguments, enable_full_determinism, set_seed
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput, has_length

from ..adapter import PromptedAdapter
from ..model_card.write import README
from ..pruning import PromptScores, score_prompts
from ..pruning.rewind import has_initial_prompts
from ..utils.files import whole_files
from ..utils.non_finite import explain_non_finite, is_finite
from ..utils.shards import refuse_shards
from .candidates import Candidate, Outcome
from .checkpoints import Progress, seal
from .config import Metric, PruningArguments, PruningConfig
from .data import DataSample
from .engines import Engines
from .lock import locked
from .model_card import ModelCardTrainer, results_in
from .phase import PhaseProgress, is_exact
from .preparation import FINAL_TRAIN, TRAIN, look_at_data, settings_of
from .processes import on_main_process
from .report import MESSAGE, SearchReport, card_paragraph, log_entry, printable
from .search import FINAL, TUNE, PruningSearch
from .state import SearchState

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class _Run:
    """What the phases of one search have in common.

    Attributes:
        adapter ([`PromptedAdapter`]): The adapter.
        metric ([`Metric`]): What decides.
        state ([`SearchState`]): What is finished.
        ignore_keys (`list[str]`, *optional*): Outputs of the model that evaluations leave out.
        data (`dict[str, DataSample]`): Samples of the data sets, by the names of the Trainer's attributes.
        counters (`list[tuple[Any, dict[str, Any]]]`):
            Callbacks that count (early stopping), and their attributes before: they begin anew in every phase.
        history (`list[dict[str, Any]]`): The log of the phases that are over.
    """

    adapter: PromptedAdapter
    metric: Metric
    state: SearchState
    ignore_keys: list[str] | None
    data: dict[str, DataSample]
    counters: list[tuple[Any, dict[str, Any]]]
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)


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
    `pruning_results.json` and, if matplotlib is installed, `pruning_results.png`; while it runs, also `_pruning_lock`.

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
        pruning_config: PruningArguments | None = None,
        final_train_dataset: Dataset[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.pruning_config = PruningConfig(**({} if pruning_config is None else dataclasses.asdict(pruning_config)))
        self.final_train_dataset = final_train_dataset
        self._engines = Engines(self)
        self._progress = PhaseProgress()
        self.add_callback(self._progress)
        self._run: _Run | None = None
        scaler = self.accelerator.scaler
        self._first_scale = None if scaler is None else scaler.state_dict()
        """Of the gradients, with which every phase in float16 begins, after an interruption as without one."""

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Run the whole search.

        Args:
            resume_from_checkpoint (`bool`, *optional*):
                `True` goes on with the search in the output directory, wherever it was killed, and starts one if
                there is none. The result is that of an uninterrupted run. Data, model and settings must be those
                that the search was started with, but for what [`HARMLESS`] lists.
            trial: Not supported.
            ignore_keys_for_eval (`list[str]`, *optional*): As for [`~transformers.Trainer.train`].

        Returns:
            [`~transformers.trainer_utils.TrainOutput`]: Steps of all phases together, the training loss of the
            winner, and metrics, with the table of candidates as `"pruning_candidates"`.

        Raises:
            ValueError, TypeError: Something needed is missing or does not go together. Nothing has been trained.
            RuntimeError: Another search runs in the output directory.
            FloatingPointError: A loss is NaN or infinite; see `PruningConfig(skip_diverged=True)` for candidates.
        """
        start_time = time.time()
        folder = str(self.args.output_dir)
        adapter = self._check_setup(resume_from_checkpoint, trial)
        args, train_dataset = self.args, self.train_dataset
        try:
            with locked(folder):
                resume = bool(resume_from_checkpoint) and SearchState.exists(folder)
                self._run = run = self._prepare(adapter, resume, ignore_keys_for_eval)
                report = SearchReport(self._search(run).run(), run.metric.name, self.pruning_config.tolerance)
                on_main_process(lambda: report.write(Path(folder)))
            logger.log(logging.INFO if report.result.has_pruned else logging.WARNING, report.message)
            self.log(report.log_entry())
            self.state.log_history = run.history + self.state.log_history
            return report.output(time.time() - start_time)
        finally:
            self.args, self.train_dataset, self._run = args, train_dataset, None
            self._release()

    def _prepare(self, adapter: PromptedAdapter, resume: bool, ignore_keys: list[str] | None) -> _Run:
        """Open the state of the search, when all is known to work that a phase will need."""
        # Reporters open their files now, in the user's output directory.
        self.log({"phase": "start"})  # type: ignore[dict-item]
        metric = Metric.of(self.pruning_config, self.args)
        self._engines.place_whole_model()
        data = look_at_data(self, adapter)
        if not resume:
            metric.value_in(self.evaluate(ignore_keys=ignore_keys))
        callbacks = [c for c in self.callback_handler.callbacks if isinstance(c, ExportableState)]
        counters = [(callback, copy.deepcopy(callback.state()["attributes"])) for callback in callbacks]
        settings = settings_of(self, adapter, self.pruning_config, metric, data)
        state = SearchState(str(self.args.output_dir), settings, resume)
        return _Run(adapter, metric, state, ignore_keys, data, counters)

    def _search(self, run: _Run) -> PruningSearch:
        return PruningSearch(
            run.adapter,
            self.pruning_config,
            run.state,
            fit=partial(self._fit, run),
            score=partial(self._score, run),
            log=partial(self._log_phase, run),
            length=_length(self.args),
            greater_is_better=run.metric.greater_is_better,
            final_training=self.final_train_dataset is not None,
            seed=self.args.seed,
            progress_bar=not self.args.disable_tqdm and self.is_local_process_zero(),
        )

    def _fit(self, run: _Run, phase: str, length: float) -> Outcome:
        """Train the adapter as it is, for so many epochs or steps, and evaluate it."""
        logger.info("Pruning: phase %s", phase)
        # Trainer resumes adapters of no other kind.
        found = run.state.last_checkpoint(phase) if isinstance(self.model, PeftModel) else None
        args, train_dataset = self.args, self.train_dataset
        self.args = _phase_arguments(args, run.state.phase_folder(phase), length)
        if phase == FINAL:
            self.train_dataset = self.final_train_dataset
        try:
            self._forget(run)
            checkpoint = self._go_on_from(run, found)
            with self._engines.sharded_copy(run.adapter):
                super().train(resume_from_checkpoint=checkpoint, ignore_keys_for_eval=run.ignore_keys)
            train_loss = self._progress.loss / max(self.state.global_step, 1)
            self._check_weights(run.adapter.model)
            value = run.metric.value_in(self.evaluate(ignore_keys=run.ignore_keys))
        except FloatingPointError as error:
            if phase in (TUNE, FINAL) or not self.pruning_config.skip_diverged:
                raise
            logger.warning("%s The candidate is skipped.", error)
            train_loss = value = math.nan
        finally:
            self.args, self.train_dataset = args, train_dataset
        epochs = float(self.state.epoch or 0)
        return Outcome(value, epochs, self.state.global_step, train_loss, self._train_batch_size)

    def _go_on_from(self, run: _Run, found: tuple[str, Progress] | None) -> str | None:
        """Put back what Trainer does not, and return the checkpoint that it is to go on from."""
        batch_sizes = [record["batch_size"] for record in run.state.records.values() if "batch_size" in record]
        if self.args.auto_find_batch_size and batch_sizes:
            self._train_batch_size = batch_sizes[-1]
        checkpoint, self._progress.resumed = (None, None) if found is None else found
        if self._progress.resumed is not None:
            for (callback, _), attributes in zip(run.counters, self._progress.resumed.callbacks, strict=True):
                for name, value in attributes.items():
                    setattr(callback, name, value)
        return checkpoint

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self._run is None or not self.args.should_save:
            return
        loader = self.callback_handler.train_dataloader
        batches = len(loader) if has_length(loader) else None
        sample = self._run.data[FINAL_TRAIN if self._phase == FINAL else TRAIN]
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        progress = Progress(
            is_exact=is_exact(self.args, self.state, self.control, batches, sample),
            loss=self._progress.loss,
            callbacks=[callback.state()["attributes"] for callback, _ in self._run.counters],
            best=None if best is None else Path(best).name,
        )
        seal(Path(str(self.args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}", progress)

    def _score(self, run: _Run) -> PromptScores:
        set_seed(self.args.seed)
        self._engines.place_whole_model()
        dataset: Any = self.train_dataset
        max_batches = self.pruning_config.max_score_batches
        if max_batches is None and not has_length(dataset):  # it may have no end: as much as a training sees
            samples = self.args.max_steps * self.args.gradient_accumulation_steps * self.args.train_batch_size
            max_batches = math.ceil(samples / self.args.eval_batch_size)
        with self.accelerator.autocast():
            scores = score_prompts(
                run.adapter.model,
                self.get_test_dataloader(dataset),  # in order, as for evaluation
                self.pruning_config.importance,
                adapter_name=run.adapter.name,
                max_batches=max_batches,
                progress_bar=not self.args.disable_tqdm and self.is_local_process_zero(),
            )
        self.log({"phase": "score", "visual_prompts": len(scores.tokens)})  # type: ignore[dict-item]
        return scores

    def _log_phase(self, run: _Run, phase: str, candidate: Candidate) -> None:
        self.log(log_entry(phase, candidate, run.metric.name))

    def _forget(self, run: _Run) -> None:
        """Make the Trainer forget the last phase: its optimizer, its wrappers, what callbacks counted, the scale of
        gradients, randomness."""
        run.history += self.state.log_history  # Trainer makes a new one
        self._release()
        if self._first_scale is not None:
            self.accelerator.scaler.load_state_dict(self._first_scale)
        for callback, attributes in run.counters:
            for name, value in copy.deepcopy(attributes).items():
                setattr(callback, name, value)
        if self.args.full_determinism:
            enable_full_determinism(self.args.seed)
        else:
            set_seed(self.args.seed)

    def _release(self) -> None:
        """Let go of what belongs to the parameters there were, since pruning makes new ones. Trainer frees it."""
        self.optimizer = self.lr_scheduler = None
        # Takes mixed precision off the forward method, which would be wrapped once more in every phase.
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        # An evaluation marks the model as prepared, and Accelerate would not prepare it for training any more: several
        # processes would train without exchanging gradients.
        model._is_accelerate_prepared = False
        self.model_wrapped = model

    @property
    def _phase(self) -> str:
        """Each has a folder of its own, by its name."""
        return Path(str(self.args.output_dir)).name

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """As [`~transformers.Trainer.training_step`], but refuses a loss that is NaN or infinite.

        Raises:
            FloatingPointError:
                It is. The message has the phase, the step and the likely cause; the weights are those of the step
                before.
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
        self._progress.loss += loss.mean().item()
        return loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As [`~transformers.Trainer.evaluation_loop`]; between phases, of the whole model."""
        self._engines.place_whole_model()
        return super().evaluation_loop(*args, **kwargs)

    def _check_weights(self, model: nn.Module) -> None:
        """The last update of a phase may be the one that overflows, and a metric need not show it."""
        spoilt = [name for name, parameter in model.named_parameters() if not is_finite(parameter)]
        if spoilt:
            raise FloatingPointError(
                f"'{spoilt[0]}' is NaN or infinite after the last step of phase '{self._phase}' "
                f"({self.state.global_step}): try a lower learning rate, or gradient clipping (max_grad_norm)."
            )

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            super()._save(output_dir, state_dict)
            return
        with whole_files(Path(str(self.args.output_dir if output_dir is None else output_dir)), [README]) as folder:
            super()._save(str(folder), state_dict)

    def log_metrics(self, split: str, metrics: dict[str, float]) -> None:
        """As [`~transformers.Trainer.log_metrics`], then what was pruned, without the table of candidates."""
        super().log_metrics(split, printable(metrics))
        if MESSAGE in metrics and self.is_world_process_zero():
            print(metrics[MESSAGE])

    def _card_metrics(self) -> dict[str, float]:
        history: list[Any] = self.state.log_history
        done = [index for index, entry in enumerate(history) if entry.get("phase") == "done"]
        if not done:
            return super()._card_metrics()
        # What comes before are the results of other candidates, and the metric that decided is of weights that a
        # final training has replaced.
        return results_in(history[done[-1] + (self.final_train_dataset is not None) :])

    def _card_pruning(self) -> str | None:
        history: list[Any] = self.state.log_history
        messages = [entry["message"] for entry in history if entry.get("phase") == "done"]
        return card_paragraph(self.pruning_config, messages[-1]) if messages else None

    def _check_setup(self, resume_from_checkpoint: Any, trial: Any) -> PromptedAdapter:
        """Refuse in words what cannot work, and return the adapter."""
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
        final: Any = self.final_train_dataset
        if final is not None and not has_length(final) and self.args.max_steps <= 0:
            raise ValueError(
                "final_train_dataset has no length, so that the length of an epoch is not known: set "
                "TrainingArguments(max_steps=...)."
            )
        self._engines.check_settings()
        model: Any = self.model
        refuse_shards(model)
        try:
            adapter = PromptedAdapter.find(model)
            adapter.require_visual_prompts()
        except ValueError as error:
            raise ValueError(f"E2VPTTrainer needs one active adapter with visual prompts. {error}") from None
        known = has_initial_prompts(adapter)
        resumes = resume_from_checkpoint and SearchState.exists(str(self.args.output_dir))
        if self.pruning_config.rewind == "saved" and not known and not resumes:
            raise ValueError(
                f"rewind='saved', but the initial values of adapter '{adapter.name}' are not known, because it was "
                "loaded from a file: set PruningConfig(rewind='fresh')."
            )
        return adapter


def _length(args: TrainingArguments) -> float:
    """Of a full training, in steps if the arguments count steps, else in epochs."""
    return args.max_steps if args.max_steps > 0 else args.num_train_epochs


def _phase_arguments(args: TrainingArguments, folder: Path, length: float) -> TrainingArguments:
    """The user's arguments for a training in a folder of its own, of its own length."""
    of_phase = copy.copy(args)
    of_phase.output_dir = str(folder)
    of_phase.push_to_hub = False  # what is worth it, the user pushes at the end
    of_phase.ignore_data_skip = False
    of_phase.restore_callback_states_from_checkpoint = False  # it would replace the callbacks of the phases to come
    if args.max_steps > 0:
        of_phase.max_steps = int(length)
    else:
        of_phase.num_train_epochs = length
    if args.warmup_steps >= 1:
        of_phase.warmup_steps = int(args.warmup_steps * length / _length(args))
    return of_phase
