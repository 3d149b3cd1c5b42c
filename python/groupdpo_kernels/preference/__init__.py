"""Token log-probabilities become a preference loss and its gradient here. The package never imports models.

segments.py        sums by sequence: seq_logps
groups.py          which responses belong together, and which are preferred
losses.py          the formulas, and the list of their names
objective.py       Objective, AdaBalance, preference_loss
fused.py           the losses as one kernel launch on a GPU
group_backward.py  the backward of a group at the memory of one micro-batch
"""
