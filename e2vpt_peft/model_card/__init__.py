"""The model card of an adapter: what it is, how to use it, how it was trained and how well it does."""

from .details import CardDetails
from .write import push_model_card, write_model_card

__all__ = ["CardDetails", "push_model_card", "write_model_card"]
