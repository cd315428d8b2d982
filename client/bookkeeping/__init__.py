"""Patient gradients in one backward pass, by keeping books on what each layer saw.

Autograd is asked for the gradients of the layers' outputs only, never of the weights. As each
output's gradient arrives, the layer's remembered input turns it into what clipping needs: either
the weight gradient of every patient, or, where that would be the larger thing, its norm alone (the
"ghost" norm) and, once the norms are known, one weight gradient weighted by the clipping factors.

Guarantees:
    The sum equals a plain loop over patients.
    One patient changes the sum before noise by at most max_grad_norm.
    A patient with a non-finite gradient contributes nothing and is counted.
    Every trainable parameter has a per-patient gradient, or training stops with its name.
    Every use of a parameter is accounted for, or training stops with its name.
    An input changed in place after its layer saw it stops the training.
    A layer that is not given images first is not trusted.
    A net in which patients meet, by batch normalization or running statistics, is refused.
    No hook, flag or gradient is left on the net.

Design: three files. ``engine`` runs the chunks and proves completeness, ``layers`` knows the
weight gradient of each kind of layer, ``recurrent`` runs GRU and LSTM so that they have one too.
Layers of any other kind with parameters of their own, and nets that fold other axes into the batch,
are run patient by patient: slow, correct, and said once in the log.

References:
    Goodfellow 2015, Efficient per-example gradient computations, https://arxiv.org/abs/1510.01799.
    Bu et al. 2023, Differentially private optimization on large model at small cost (book-keeping),
    https://arxiv.org/abs/2210.00038. Li et al. 2022, Large language models can be strong
    differentially private learners (ghost norm), https://arxiv.org/abs/2110.05679. Rochette et al.
    2019, Efficient per-example gradient computations in convolutional neural networks,
    https://arxiv.org/abs/1912.06015.
"""

from client.bookkeeping.engine import bookkeeping_engine

__all__ = ["bookkeeping_engine"]
