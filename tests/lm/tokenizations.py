"""Enumerates the tokenizations of a text; shares no code with `s2t2_dist.lm.marginal`."""

import math
from functools import cache

import torch

PASS = 512  # sequences in one pass of the model


class Oracle:
    """Sums over all sequences of tokens, each by a plain pass of the model from its first token.

    Args:
        lm: in float64.
        context: the tokens before the text.
        texts: what each token spells; empty for special tokens.
        end: the token that ends a document.
    """

    def __init__(self, lm, context, texts, end=0):
        self.lm, self.context, self.end = lm, list(context), end
        self.spelling = [(token, text) for token, text in enumerate(texts) if text]
        self.enumerate = cache(self._enumerate)

    def _next_log_p(self, sequences):
        """Log p of every next token after sequences of one length."""
        rows = torch.tensor([self.context + list(tokens) for tokens in sequences])
        with torch.no_grad():
            logits = [self.lm(part, use_cache=False).logits[:, -1] for part in rows.split(PASS)]
        return torch.cat(logits).log_softmax(1).tolist()

    def _enumerate(self, text):
        """Tokens and log p of all that spells the text and ends; log p of all that reaches it.

        A sequence reaches a text when its last token makes it begin with the text.
        """
        ended, reached, longest = [], [] if text else [0.0], [((), 0.0, b"")]
        while longest:
            following = []
            log_ps = self._next_log_p([tokens for tokens, _, _ in longest])
            for (tokens, log_p, said), log_p_next in zip(longest, log_ps, strict=True):
                if said == text:
                    ended.append((tokens, log_p + log_p_next[self.end]))
                    continue
                for token, piece in self.spelling:
                    longer, total = said + piece, log_p + log_p_next[token]
                    if longer.startswith(text):
                        reached.append(total)
                    if text.startswith(longer):
                        following.append(((*tokens, token), total, longer))
            longest = following
        return ended, reached

    def document(self, text):
        """log P(text, end)."""
        return math.log(math.fsum(math.exp(log_p) for _, log_p in self.enumerate(text)[0]))

    def beginning(self, text):
        """log P(what comes begins with the text)."""
        return math.log(math.fsum(map(math.exp, self.enumerate(text)[1])))
