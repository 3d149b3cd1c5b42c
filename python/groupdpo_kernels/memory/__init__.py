"""The memory and time of a training step are measured, predicted and drawn here.

workload.py  the step that is measured: a model, a group and a strategy
tracker.py   counts the bytes of every tensor, by what it is for
planner.py   predicts the peak on hardware that is not at hand
worker.py    measures one step in a process of its own
sweep.py     measures many steps, and resumes
rss.py       the memory of a process, as the operating system counts it
machine.py   what the machine is called, and which versions it has
report.py    one HTML file;  plots.py: its pictures
"""
