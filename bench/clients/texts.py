# SPDX-License-Identifier: Apache-2.0
"""Real text that every machine has: docstrings of Python's standard library, and small encoders."""

import ast
import random
import re
import sysconfig
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

# Tests and vendored code are many files that say little; the others are old, large or generated.
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "pydoc_data"}
_WORD = re.compile(r"[A-Za-z]+|[0-9]+")
_MAX_TOKENS = 16
WIDTH = 128


class Text(NamedTuple):
    """A first sentence, what it describes, and the number of the module that it is from."""

    sentence: str
    name: str
    module: int


def split_words(name: str) -> str:
    """A qualified name as words: ``urllib.parse.urlJoin`` is "urllib parse url Join"."""
    return " ".join(re.findall(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+", name))


def _described(tree: ast.AST, prefix: str) -> list[tuple[str, str]]:
    """Qualified names below a node, with the first sentence of each docstring."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            name = f"{prefix}.{node.name}"
            if text := ast.get_docstring(node):
                sentence = " ".join(re.split(r"\.\s|\n\s*\n", text, maxsplit=1)[0].split())
                found.append((sentence, name))
            if isinstance(node, ast.ClassDef):
                found += _described(node, name)
    return found


@cache
def library_texts() -> tuple[Text, ...]:
    """Every documented class and function of the standard library, sorted by file.

    Returns:
        One per docstring of at least three words; sentences and names occur once.
    """
    root = Path(sysconfig.get_path("stdlib"))
    texts, seen, modules = [], set(), 0
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED & set(parts):
            continue
        try:
            with warnings.catch_warnings():
                # Of invalid escapes in the files.
                warnings.simplefilter("ignore")
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        before = len(texts)
        for sentence, name in _described(tree, module):
            if len(_WORD.findall(sentence)) >= 3 and not {sentence, name} & seen:
                seen |= {sentence, name}
                texts.append(Text(sentence, split_words(name), modules))
        modules += len(texts) > before
    return tuple(texts)


def draw_texts(count: int, seed: int = 0) -> list[Text]:
    """``count`` texts in random order; repeated if there are not as many."""
    texts = list(library_texts())
    random.Random(seed).shuffle(texts)
    return [texts[i % len(texts)] for i in range(count)]


def _tokenizer() -> Any:
    """Whole lower-case words of the texts, known ones only: nothing to download, nothing random."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = {
        word.lower()
        for text in library_texts()
        for word in _WORD.findall(f"{text.sentence} {text.name}")
    }
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", vocabulary["[CLS]"])]
    )
    return tokenizer


def static_model(seed: int = 0) -> Any:
    """A SentenceTransformer that averages a learned row per word: as cheap as encoders get."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    torch.manual_seed(seed)
    embedding = StaticEmbedding(_tokenizer(), embedding_dim=WIDTH)
    return SentenceTransformer(modules=[embedding], device="cpu")


def attention_model(seed: int = 0) -> Any:
    """A SentenceTransformer with two layers of attention, untrained and without dropout.

    Time and memory of a step do not depend on the weights.
    """
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    words = _tokenizer()
    config = BertConfig(
        vocab_size=words.get_vocab_size(),
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]"
    )
    with tempfile.TemporaryDirectory() as folder:
        BertModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        transformer = Transformer(folder, max_seq_length=_MAX_TOKENS)
    pooling = Pooling(transformer.get_embedding_dimension())
    return SentenceTransformer(modules=[transformer, pooling], device="cpu")
