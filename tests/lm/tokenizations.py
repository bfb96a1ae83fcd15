"""Enumerates the tokenizations of a text; shares no code with `s2t2_dist.lm.marginal`."""

import math
from functools import cache

import torch


class Oracle:
    """Sums over all sequences of tokens, each by plain passes of the model.

    Args:
        lm: in float64.
        context: the tokens before the text.
        texts: what each token spells; empty for special tokens.
        end: the token that ends a document.
    """

    def __init__(self, lm, context, texts, end=0):
        self.lm, self.context, self.end = lm, tuple(context), end
        self.spelling = [(token, text) for token, text in enumerate(texts) if text]
        self.log_p = cache(self._log_p)

    def _log_p(self, tokens):
        """Of every token after the context and these."""
        with torch.no_grad():
            logits = self.lm(torch.tensor([self.context + tokens]), use_cache=False).logits
        return logits[0, -1].log_softmax(0).tolist()

    def sequences(self, text):
        """Every tokenization of a text: tokens and their log probability."""
        stack = [((), 0.0, b"")]
        while stack:
            tokens, log_p, said = stack.pop()
            if said == text:
                yield tokens, log_p
                continue
            for token, piece in self.spelling:
                if text.startswith(said + piece):
                    more = log_p + self.log_p(tokens)[token]
                    stack.append(((*tokens, token), more, said + piece))

    def document(self, text):
        """log P(text, end)."""
        found = [log_p + self.log_p(tokens)[self.end] for tokens, log_p in self.sequences(text)]
        return math.log(math.fsum(map(math.exp, found)))

    def beginning(self, text):
        """log P(what comes begins with the text): every sequence until it says that or more."""
        found, stack = [], [((), 0.0, b"")]
        while stack:
            tokens, log_p, said = stack.pop()
            if said.startswith(text):
                found.append(math.exp(log_p))
                continue
            for token, piece in self.spelling:
                longer = said + piece
                if longer.startswith(text) or text.startswith(longer):
                    stack.append(((*tokens, token), log_p + self.log_p(tokens)[token], longer))
        return math.log(math.fsum(found))
