"""The wizard: questions with defaults, each checked at once, that end in a configuration file and a run.

    wizard(console, answers={"model": "demo"}, yes=True)

An answer is a line of text with a name. Given ahead as options, read from a pipe, typed, or read from the file that
an interrupted session left, it takes the same way; what is kept of a session is its answers. Tokens are none of
them: they stay in the environment of this process and of the run that it becomes.
"""

from pipeline.cli.wizard.questions import QUESTIONS
from pipeline.cli.wizard.session import wizard

__all__ = ["QUESTIONS", "wizard"]
