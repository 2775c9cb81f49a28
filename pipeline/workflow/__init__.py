"""Run the stages of a run, each in a process of its own, and record what is done."""
