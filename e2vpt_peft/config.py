"""The configuration of an E²VPT adapter."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Optional, Union

from peft import PeftConfig

from .adapter_file import check_adapter_file
from .masks import PromptMasks
from .prompt_shapes import AttentionSizes, saved_shapes
from .registration import E2VPTType
from .saved_weights import NOTHING_LOADED, ExpectedWeights, SavedWeights
from .utils.fields import MAX_NAMES, check_choice, check_integer, check_module_names, check_probability, check_type
from .version import __version__

MAX_PROMPTS = 10_000
"""More than that per layer are no prompts any more (a ViT-B/16 has 197 tokens), and would only fill the memory."""
MAX_SEGMENTS = 10_000_000
"""Of all prompts together: 10,000 prompts of 1,000 segments. The masks of more would only fill the memory."""


@dataclass
class E2VPTConfig(PeftConfig):
    """
    This is the configuration class to store the configuration of an [`E2VPTModel`].

    The defaults are the setting that the paper (https://huggingface.co/papers/2307.13770) uses most.

    PEFT keeps the object that it is given, `model.peft_config["default"] is config`, and what is found in the model is
    written into it: `target_modules` if there were none, and `backbone`. One object can serve several adapters, of one
    model or of models of the same architecture and sizes. Pruning gives the pruned adapter a configuration of its own,
    which `model.peft_config` has from then on. Another backbone needs a new object.

    Args:
        num_visual_prompts (`int`, defaults to `10`):
            Visual prompts, learnable tokens beside the image tokens: per layer when deep, in all when shallow. `0` for
            key-value prompts alone.
        visual_prompt_depth (`"deep"` or `"shallow"`, defaults to `"deep"`):
            `"deep"` gives every adapted layer visual prompts of its own, which live for that layer only (VPT-Deep).
            `"shallow"` puts visual prompts in front of the first adapted layer, from where they go through all the
            layers that follow (VPT-Shallow).
        num_kv_prompts (`int`, defaults to `5`):
            Key-value prompts: learnable rows of keys and values, for every head of every adapted layer (section 3.2 of
            the paper). `0` for visual prompts alone, which makes the method VPT.
        share_kv_prompts (`bool`, defaults to `True`):
            Use one tensor as key and as value prompts, as the paper does. `False` learns two.
        kv_prompt_activation (`Optional["gelu"]`):
            How queries read key-value prompts. `None`, as in the paper (equation 5): in the attention's softmax, so
            that the attention paid to them is taken from the sequence. `"gelu"`: beside it. The output of each head
            becomes `softmax(s q K^T) V + gelu(s q K_P^T) V_P`, with the scale `s` of the attention. `V_P` starts at
            zero and `K_P` normal with standard deviation 0.5, whatever `init_weights` is, so that they start without
            an effect. Needs `share_kv_prompts=False`. It is the multi-head parallel adapter of He et al.
            (https://huggingface.co/papers/2110.04366), with the attention's own queries as its first product.
        init_weights (`bool` or `"kaiming_uniform"` or `"trunc_normal"`, defaults to `"kaiming_uniform"`):
            How prompts are initialised, in one of the two ways that the paper compares. `"kaiming_uniform"`, its
            choice: visual prompts uniform in ±sqrt(6 / (3 p² + D)), with p the patch size and D the hidden size (as in
            VPT), key-value prompts uniform in ±sqrt(6 / (n d)), with n their number and d the head size.
            `"trunc_normal"`: all of them normal with standard deviation 0.02, cut off at two deviations, as the tokens
            of a ViT. `True`, as in other PEFT configs, is the default; so is `False`, which elsewhere means that the
            start is not neutral: that of prompts never is.
        prompt_dropout (`float`, defaults to `0.1`):
            Dropout probability on visual prompts, drawn per sample, in training only.
        kv_prompt_dropout (`float`, defaults to `0.0`):
            Dropout probability on key-value prompts, drawn per sample, in training only.
        num_segments (`int`, defaults to `16`):
            Into how many segments a visual prompt is divided for pruning: component `j` belongs to segment
            `j % num_segments`. Must divide the hidden size of the adapted layers.
        target_modules (`Optional[Union[list[str], str]]`):
            The self-attention modules to adapt: names or endings of names, or a regular expression that matches the
            whole name. Any module that calls transformers' attention interface will do. Chosen by the architecture if
            not given.
        exclude_modules (`Optional[Union[list[str], str]]`):
            The modules not to adapt: names or endings of names, or a regular expression that matches the whole name.
        layers_to_transform (`Optional[Union[list[int], int]]`):
            The indices of the layers to adapt, counted from 0. All if not given.
        layers_pattern (`Optional[Union[list[str], str]]`):
            The name of the module list that `layers_to_transform` counts in, where it is not the first one on the way
            to the attention.
        modules_to_save (`Optional[list[str]]`):
            Modules besides the prompts to train and to save with the adapter, for example the `classifier`.
        attention_norm (`Optional[str]`):
            The normalisation layer in front of the attention, which deep visual prompts pass before they are
            projected: the name of an attribute of the attention's parent or grandparent, or `"none"` for a model that
            has none there (post-norm). Only needed for architectures that this package does not know.
        num_special_tokens (`Optional[int]`):
            The number of tokens in front of the others (class token, registers), behind which shallow visual prompts
            are inserted. Only needed for shallow prompts and architectures that this package does not know, for which
            it is taken to be 0.
        backbone (`Optional[dict[str, Any]]`):
            The sizes of the backbone that the adapter was made for: not to be set by hand. Filled in when the adapter
            is made, saved with it, and checked when it is loaded, so that an adapter that does not fit is refused
            before anything is changed. `None` turns the check off.
        token_mask (`Optional[list[bool]]`):
            Which visual prompts pruning kept. Written by [`prune_prompts`].
        segment_mask (`Optional[list[list[bool]]]`):
            Which segments of each visual prompt pruning kept. Written by [`prune_prompts`].

    Raises:
        TypeError: A field has the wrong type.
        ValueError:
            A field has a value that is not allowed. The message names the field, the value and what is allowed.

    Example:

        ```py
        >>> from e2vpt_peft import E2VPTConfig

        >>> config = E2VPTConfig(num_visual_prompts=10, num_kv_prompts=5, modules_to_save=["classifier"])
        ```
    """

    num_visual_prompts: int = field(
        default=10, metadata={"help": "Number of visual prompts: per layer when deep, in all when shallow."}
    )
    visual_prompt_depth: Literal["deep", "shallow"] = field(
        default="deep",
        metadata={"help": "'deep': own visual prompts in every layer. 'shallow': in front of the first layer only."},
    )
    num_kv_prompts: int = field(
        default=5, metadata={"help": "Number of key-value prompts: rows of keys and values per head and layer."}
    )
    share_kv_prompts: bool = field(
        default=True, metadata={"help": "Whether one tensor serves as key and as value prompts."}
    )
    kv_prompt_activation: Optional[Literal["gelu"]] = field(
        default=None,
        metadata={
            "help": (
                "How queries read key-value prompts: in the softmax of the attention, as in the paper, or with 'gelu' "
                "beside it, which takes no attention from the sequence and needs share_kv_prompts=False."
            )
        },
    )
    init_weights: Literal[True, False, "kaiming_uniform", "trunc_normal"] = field(
        default="kaiming_uniform",
        metadata={
            "help": (
                "How prompts are initialised: 'kaiming_uniform', as in the paper and for True or False, or "
                "'trunc_normal'."
            )
        },
    )
    prompt_dropout: float = field(
        default=0.1, metadata={"help": "Dropout probability on visual prompts, drawn per sample, in training only."}
    )
    kv_prompt_dropout: float = field(
        default=0.0, metadata={"help": "Dropout probability on key-value prompts, drawn per sample, in training only."}
    )
    num_segments: int = field(
        default=16,
        metadata={
            "help": (
                "Number of segments into which a visual prompt is divided for pruning; component j belongs to segment "
                "j % num_segments. Must divide the hidden size."
            )
        },
    )
    target_modules: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={
            "help": (
                "List of names (or endings of names), or regular expression, of the self-attention modules to adapt. "
                "Any module that calls transformers' attention interface. Chosen by the architecture if not specified."
            )
        },
    )
    exclude_modules: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={"help": "List of names (or endings of names), or regular expression, of modules not to adapt."},
    )
    layers_to_transform: Optional[Union[list[int], int]] = field(
        default=None, metadata={"help": "Index or indices of the layers to adapt. All layers if not specified."}
    )
    layers_pattern: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={"help": "Name of the module list that `layers_to_transform` counts in, if it is not the first one."},
    )
    modules_to_save: Optional[list[str]] = field(
        default=None,
        metadata={
            "help": (
                "List of modules besides the prompts to train and to save with the adapter, for example the "
                "`classifier` of an image classification model."
            )
        },
    )
    attention_norm: Optional[str] = field(
        default=None,
        metadata={
            "help": (
                "Name of the normalisation layer in front of the attention, an attribute of the attention's parent or "
                "grandparent, or 'none'. Only needed for architectures that the package does not know."
            )
        },
    )
    num_special_tokens: Optional[int] = field(
        default=None,
        metadata={
            "help": (
                "Number of tokens in front of the others, behind which shallow visual prompts are inserted. Only "
                "needed for architectures that the package does not know."
            )
        },
    )
    backbone: Optional[dict[str, Any]] = field(
        default=None,
        metadata={
            "help": (
                "Sizes of the backbone that the adapter was made for; filled in when it is made and checked when it "
                "is loaded. Not to be set by hand."
            )
        },
    )
    token_mask: Optional[list[bool]] = field(
        default=None, metadata={"help": "Which visual prompts pruning kept; written by `prune_prompts`."}
    )
    segment_mask: Optional[list[list[bool]]] = field(
        default=None,
        metadata={"help": "Which segments of each visual prompt pruning kept; written by `prune_prompts`."},
    )

    saved_weights: ClassVar[Optional[SavedWeights]] = None
    """Of a configuration that was read with weights beside it, until an adapter is made of it: what they are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = E2VPTType.E2VPT
        self._check_inherited()
        for name in ("num_visual_prompts", "num_kv_prompts"):
            check_integer(name, getattr(self, name), at_least=0)
            if getattr(self, name) > MAX_PROMPTS:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} must be {MAX_PROMPTS} or less: the tokens of an image are "
                    "hundreds, and prompts a few beside them."
                )
        if self.num_visual_prompts == 0 and self.num_kv_prompts == 0:
            raise ValueError(
                "num_visual_prompts=0 and num_kv_prompts=0 leave nothing to train: at least one must be 1 or more."
            )
        check_choice("visual_prompt_depth", self.visual_prompt_depth, ("deep", "shallow"))
        check_type("share_kv_prompts", self.share_kv_prompts, bool, "True or False")
        check_choice("kv_prompt_activation", self.kv_prompt_activation, (None, "gelu"))
        if self.kv_prompt_activation is not None and self.share_kv_prompts:
            raise ValueError(
                "kv_prompt_activation='gelu' needs share_kv_prompts=False: value prompts start at zero, and keys that "
                "are the same tensor would never learn."
            )
        if not isinstance(self.init_weights, bool):
            check_choice("init_weights", self.init_weights, ("kaiming_uniform", "trunc_normal"))
        for name in ("prompt_dropout", "kv_prompt_dropout"):
            check_probability(name, getattr(self, name))
        check_integer("num_segments", self.num_segments, at_least=1)
        if max(self.num_visual_prompts, 1) * self.num_segments > MAX_SEGMENTS:
            raise ValueError(
                f"num_segments={self.num_segments!r} of num_visual_prompts={self.num_visual_prompts!r} are more than "
                f"{MAX_SEGMENTS:,} in all: a prompt has at most as many segments as components, a few thousand."
            )
        if self.num_special_tokens is not None:
            check_integer("num_special_tokens", self.num_special_tokens, at_least=0)
        check_type("attention_norm", self.attention_norm, str, "the name of a module", optional=True)
        check_module_names("target_modules", self.target_modules, or_pattern=True)
        check_module_names("exclude_modules", self.exclude_modules, or_pattern=True)
        # PEFT puts these into regular expressions.
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        check_module_names("layers_pattern", patterns or None, literal=True)
        check_module_names("modules_to_save", self.modules_to_save, literal=True)
        _check_layer_indices(self.layers_to_transform)
        if isinstance(self.layers_to_transform, (list, tuple)):
            self.layers_to_transform = list(dict.fromkeys(self.layers_to_transform))
        _check_backbone_sizes(self.backbone)
        if self.token_mask is not None:
            _check_mask("token_mask", self.token_mask, [self.num_visual_prompts])
        if self.segment_mask is not None:
            _check_mask("segment_mask", self.segment_mask, [self.num_visual_prompts, self.num_segments])
            PromptMasks.of(self).check_not_empty()
        if isinstance(self.target_modules, (list, tuple, set)):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, (list, tuple, set)):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} cannot be used when target_modules is a string "
                        f"({self.target_modules!r}): put the layers into that regular expression, or pass a list."
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern={self.layers_pattern!r} needs layers_to_transform, which is not given.")

    @property
    def num_kv_prompts_beside(self) -> int:
        """How many key-value prompts are read beside the attention, not in its softmax: all of them or none."""
        return 0 if self.kv_prompt_activation is None else self.num_kv_prompts

    def _check_inherited(self) -> None:
        """The fields of every PEFT method, which PEFT does not check."""
        for name in ("base_model_name_or_path", "revision", "peft_version"):
            check_type(name, getattr(self, name), str, "a string", optional=True)
        check_type("inference_mode", self.inference_mode, bool, "True or False")
        check_type("auto_mapping", self.auto_mapping, dict, "a dictionary", optional=True)

    def _expected_weights(self) -> ExpectedWeights:
        """What the file beside this configuration has to hold; any size where the backbone's is not known."""
        backbone = self.backbone or {}
        sizes = [backbone.get(name, 0) for name in AttentionSizes._fields]
        # Sizes that are not the same everywhere are lists, with a number for each layer.
        number = max((len(size) for size in sizes if isinstance(size, list)), default=1)
        of_layers = zip(*(size if isinstance(size, list) else [size] * number for size in sizes))
        masks = PromptMasks.of(self)
        return ExpectedWeights(
            shapes=[saved_shapes(self, AttentionSizes(*each), masks) for each in dict.fromkeys(of_layers)],
            num_layers=backbone.get("num_layers"),
            modules_to_save=list(self.modules_to_save or []),
            is_shallow=self.visual_prompt_depth == "shallow",
            in_all_layers=self.layers_to_transform is None,
            segment_mask=masks.segments.tolist() if masks.has_pruned_segments else None,
            must_exist=self.inference_mode,
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: Optional[str] = None, **kwargs: Any
    ) -> PeftConfig:
        """Load a configuration, as [`~peft.PeftConfig.from_pretrained`], and check the weights that are beside it.

        PEFT calls this before it touches the model. What the header of the file says is compared with the model when
        the adapter is put into it. For the configuration alone, whatever the weights are, call
        `PeftConfig.from_pretrained`.

        Args:
            pretrained_model_name_or_path (`str`): The folder, or the repository on the Hub.
            subfolder (`str`, *optional*): The subfolder of that.
            **kwargs: Those of `hf_hub_download`.

        Raises:
            TypeError: A field has the wrong type.
            ValueError:
                A field has a value that is not allowed or is of a newer version, or the weights are pickled, damaged,
                not finite, or not what the configuration says.
        """
        config: PeftConfig = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if isinstance(config, E2VPTConfig):
            download, _, _ = cls._split_kwargs(kwargs)
            saved = check_adapter_file(config._expected_weights(), pretrained_model_name_or_path, subfolder, download)
            if saved is not None:
                # `PeftModel.load_adapter` passes the one and keeps the other for itself.
                later = "ephemeral_gpu_offload" in kwargs or bool(kwargs.get("ignore_mismatched_sizes"))
                vars(config)["saved_weights"] = saved._replace(heads_are_compared_later=later)
        return config

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Refuse what a newer version has put into a file, unless it is not in use.

        PEFT would warn and leave it out, and the adapter would compute something else.
        """
        known = {known.name for known in fields(cls)}
        unknown = {name: value for name, value in kwargs.items() if name not in known and value}
        if unknown and kwargs.get("peft_type") == E2VPTType.E2VPT:
            raise ValueError(
                f"The configuration has {', '.join(f'{name}={value!r}' for name, value in unknown.items())}, which "
                f"e2vpt_peft {__version__} does not know: it was saved by a newer version of e2vpt_peft or PEFT. "
                f"Upgrade both. {NOTHING_LOADED}"
            )
        return kwargs


def _check_layer_indices(value: Any) -> None:
    indices = value if isinstance(value, (list, tuple, range)) else [] if value is None else [value]
    if not all(isinstance(index, int) and not isinstance(index, bool) for index in indices):
        raise TypeError(f"layers_to_transform={value!r} must be an integer, a list of integers, or None.")


def _check_backbone_sizes(value: Any) -> None:
    check_type("backbone", value, dict, "a dictionary", optional=True)
    backbone = value or {}
    check_integer("backbone['num_layers']", backbone.get("num_layers", 1), at_least=1)
    lengths = set()
    for name in AttentionSizes._fields:
        size = backbone.get(name, 1)
        several = isinstance(size, list)
        for one in size if several else [size]:
            check_integer(f"backbone[{name!r}]", one, at_least=1)
        if several:
            lengths.add(len(size))
    most = min(backbone.get("num_layers", MAX_NAMES), MAX_NAMES)
    if len(lengths) > 1 or not all(1 <= length <= most for length in lengths):
        raise ValueError(
            f"backbone={reprlib.repr(value)} has lists of {sorted(lengths)} sizes: there must be one for each adapted "
            f"layer, of which there are at most {most}."
        )


def _check_mask(name: str, value: Any, shape: list[int]) -> None:
    rows = [value] if len(shape) == 1 else value
    is_mask = (
        isinstance(value, list)
        and all(isinstance(row, list) and len(row) == shape[-1] for row in rows)
        and len(value) == shape[0]
        and all(isinstance(kept, bool) for row in rows for kept in row)
    )
    if not is_mask:
        raise ValueError(
            f"{name} must be a list of {' lists of '.join(map(str, shape))} booleans, for num_visual_prompts and "
            f"num_segments, but is {reprlib.repr(value)}."
        )
    if not any(kept for row in rows for kept in row):
        raise ValueError(f"{name}={reprlib.repr(value)} keeps nothing: at least one must be True.")
