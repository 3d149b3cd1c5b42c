"""Hidden states and an LM head give token log-probabilities here, without the logits.

api.py             the public functions: linear_logps, linear_logp_stats, explain
dispatch.py        the paths that a call can take, and which of them it takes
implementations.py Triton, C++ or plain PyTorch: which can run, and why not the others
autograd.py        the autograd Functions behind the paths
ops.py             the torch.library ops that the Functions call
host.py            the ops on the host: values checked, ignored rows removed
torch_blocks.py    the implementation in plain PyTorch, a block of the vocabulary at a time
extension.py       the C++ and CUDA extension, if it is built
sparse.py          gradients over the likely entries of a row (grad_tol)
logit_cache.py     logits that a CPU keeps from the forward for the backward
workspace.py       bytes that the ops allocate inside
vocab_parallel.py  a vocabulary that is split over processes
"""
