"""From any source to tokenised documents, and from documents to packed batches."""

from entkd.data.corpus import Corpus, read_texts
from entkd.data.stage import prepare

__all__ = ["Corpus", "prepare", "read_texts"]
