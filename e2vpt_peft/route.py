"""Different adapters in one batch: which adapter each sample goes through."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

BASE_MODEL = "__base__"
"""The adapter name that stands for the model without an adapter, as everywhere in PEFT."""


class Route:
    """The adapter of each sample of a batch.

    A sample is what has a row of its own in the batch of an adapted tower: an image, a text, a sound. Wherever a batch
    size is asked for, it may be a multiple of the number of samples: some models cut an image into windows, which are
    neighbours in the batch, and so are the copies of a sample that are generated from.

    Args:
        sample_adapters (`Sequence[str]`): One adapter name per sample.
        device (`Optional[torch.device]`): Where the samples are, so that no layer has to wait for a transfer.
        copies (`int`): How often each sample may be in the batch, for beams of generated text.
        doubt (`str`): Why as many samples as names may still not be those that are meant; empty if they are.
    """

    def __init__(
        self, sample_adapters: Sequence[str], device: torch.device | None = None, copies: int = 1, doubt: str = ""
    ) -> None:
        self.adapters = sorted(set(sample_adapters))
        """The adapters that occur, each once, in an order that does not depend on that of the samples."""
        self.counts = [list(sample_adapters).count(name) for name in self.adapters]
        """For each of `adapters`, its number of samples."""
        self.index = torch.tensor(
            [self.adapters.index(name) for name in sample_adapters], dtype=torch.long, device=device
        )
        """For each sample, where its adapter stands in `adapters`."""
        self.num_samples = sum(self.counts)
        self.copies = copies
        self.doubt = doubt
        self._known: dict[tuple[object, ...], torch.Tensor] = {}
        self._counted: set[str] = set()

    def count(self, batch_size: int, stack: str, where: str) -> None:
        """[`check`] a batch that enters a stack of blocks, outside of windows.

        Args:
            batch_size (`int`): Its size.
            stack (`str`): The name of the stack.
            where (`str`): The name of the block.
        """
        self.check(batch_size, where)
        self._counted.add(stack)

    def count_once(self, batch_size: int, stack: str) -> None:
        """[`check`] a batch that is inside of a stack of blocks, unless the stack has counted it where it entered.

        The block that counts may have been cut off, or passed by.
        """
        if stack not in self._counted:
            self.check(batch_size, stack)

    def check(self, batch_size: int, where: str) -> None:
        """Refuse a batch, outside of windows, that the names are not for.

        Args:
            batch_size (`int`): Its size.
            where (`str`): The name of the module that it arrives at.

        Raises:
            ValueError: It does not have one sample, or one for each copy, for each name.
        """
        if batch_size not in (self.num_samples, self.num_samples * self.copies):
            raise ValueError(
                f"adapter_names has {self.num_samples} names, but a batch of {batch_size} arrives at '{where}': give "
                "one name for each of these, in their order. A sample of several images (crops, frames, texts) needs "
                "its name for each of them. If parts of the model get batches of different sizes, run the adapters "
                "one after the other. If the samples are copied for beams, pass num_beams to generate()."
            )
        if self.doubt:
            raise ValueError(self.doubt)

    def gather(self, rows: Sequence[torch.Tensor], batch_size: int) -> torch.Tensor:
        """Give each sample the rows of its adapter.

        Args:
            rows (`Sequence[torch.Tensor]`):
                For each of `adapters`, its rows, of shape (1, number of rows, ...).
            batch_size (`int`): The batch size where they are used.

        Returns:
            `torch.Tensor`: (batch size, largest number of rows, ...), padded with zeros.
        """
        longest = max(part.shape[1] for part in rows)
        padded = [F.pad(part, (0, 0) * (part.dim() - 2) + (0, longest - part.shape[1])) for part in rows]
        return torch.cat(padded).index_select(0, self._index(batch_size, rows[0].device))

    def gather_both(
        self, rows: Sequence[tuple[torch.Tensor, torch.Tensor]], batch_size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[`gather`] for keys and for values.

        Args:
            rows (`Sequence[tuple[torch.Tensor, torch.Tensor]]`): For each of `adapters`, its keys and its values.
            batch_size (`int`): The batch size where they are used.
        """
        keys, values = zip(*rows)
        return self.gather(keys, batch_size), self.gather(values, batch_size)

    def visible(self, lengths: Sequence[int], batch_size: int, device: torch.device) -> torch.Tensor | None:
        """Which of the gathered rows are a sample's own, (batch size, largest number of rows); `None` if all are.

        Args:
            lengths (`Sequence[int]`): For each of `adapters`, its number of rows.
            batch_size (`int`): The batch size where they are used.
            device (`torch.device`): Where to put the result.
        """
        if min(lengths) == max(lengths):
            return None

        def compute() -> torch.Tensor:
            own = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
            return own.to(device).index_select(0, self._index(batch_size, device))

        return self._once(("visible", *lengths, batch_size, device), compute)

    def row_index(
        self, starts: Sequence[int], lengths: Sequence[int], batch_size: int, device: torch.device
    ) -> torch.Tensor:
        """Where the rows of each sample are, if those of all adapters lie in one tensor.

        Args:
            starts, lengths (`Sequence[int]`): For each of `adapters`, its first row, and how many it has.
            batch_size (`int`): The batch size where they are used.
            device (`torch.device`): Where to put the result.

        Returns:
            `torch.Tensor`: (batch size times largest number of rows,), 0 for what a sample has not.
        """

        def compute() -> torch.Tensor:
            first, count = torch.tensor([starts, lengths])[:, :, None]
            place = torch.arange(max(lengths))[None]
            index = torch.where(place < count, first + place, 0)
            return index.to(device).index_select(0, self._index(batch_size, device)).flatten()

        return self._once(("rows", *starts, *lengths, batch_size, device), compute)

    def dispatch(
        self, states: torch.Tensor, modules: Sequence[Callable[[torch.Tensor], torch.Tensor]]
    ) -> torch.Tensor:
        """Run each sample through the module of its adapter, each module once.

        Args:
            states (`torch.Tensor`): The input, of shape (batch size, ...).
            modules (`Sequence[Callable]`): For each of `adapters`, what its samples go through.

        Returns:
            `torch.Tensor`: The outputs, in the order of the samples.

        Raises:
            ValueError: The outputs do not fit into one tensor.
        """
        windows = states.shape[0] // self.num_samples
        order = self._index(states.shape[0], states.device).argsort(stable=True)
        parts = states.index_select(0, order).split([count * windows for count in self.counts])
        outputs = [module(part) for module, part in zip(modules, parts)]
        shapes = {name: tuple(output.shape[1:]) for name, output in zip(self.adapters, outputs)}
        if len(set(shapes.values())) > 1:
            raise ValueError(
                f"adapter_names mixes adapters whose modules_to_save give outputs of different shapes, {shapes} for "
                "each sample: they do not fit into one batch. Run them one after the other."
            )
        return torch.cat(outputs).index_select(0, order.argsort())

    def dispatch_linear(
        self, states: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor] | None
    ) -> torch.Tensor:
        """[`dispatch`] for linear layers of the same size, as one product: each sample goes through all of them.

        For a head that is little work. One product for each adapter is many small ones, and their sizes would be
        constants of a compiled model.

        Args:
            states (`torch.Tensor`): The input, of shape (batch size, features).
            weights (`Sequence[torch.Tensor]`): For each of `adapters`, its weight, (outputs, features).
            biases (`Optional[Sequence[torch.Tensor]]`): Likewise, (outputs,).

        Returns:
            `torch.Tensor`: (batch size, outputs).
        """
        bias = None if biases is None else torch.cat(list(biases))
        outputs: torch.Tensor = F.linear(states, torch.cat(list(weights)), bias).unflatten(-1, (len(weights), -1))
        index = self._index(states.shape[0], states.device)
        return outputs.gather(1, index[:, None, None].expand(-1, 1, outputs.shape[-1])).squeeze(1)

    def _index(self, batch_size: int, device: torch.device) -> torch.Tensor:
        windows = batch_size // self.num_samples
        index = self.index.to(device)
        return index if windows == 1 else index.repeat_interleave(windows)

    def _once(self, key: tuple[object, ...], compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What all layers ask for, computed for the first one."""
        if torch.compiler.is_compiling():  # a graph has each thing once by itself, and should change nothing outside
            return compute()
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]
