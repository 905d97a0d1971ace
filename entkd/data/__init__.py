"""From any source to tokenised documents, and from documents to packed batches."""

from entkd.data.corpus import Corpus, read_texts

__all__ = ["Corpus", "read_texts"]
