"""The wizard: questions with defaults, each checked at once, that end in a configuration file and a run.

    wizard(console, answers={"model": "demo"}, yes=True)

An answer is a line of text with a name. Options, a pipe, the keyboard and the file of an interrupted session are
handled alike. Only answers are saved. Tokens are no answers: they stay in the environment of this process.
"""

from pipeline.cli.wizard.questions import QUESTIONS
from pipeline.cli.wizard.session import wizard

__all__ = ["QUESTIONS", "wizard"]
