"""All questions, in the order in which they are asked."""

from pipeline.cli.wizard import data, destination, finish, model, quality, quantizing, training

QUESTIONS = (
    *model.QUESTIONS,
    *data.QUESTIONS,
    *training.QUESTIONS,
    *destination.QUESTIONS,
    *quantizing.QUESTIONS,
    *quality.QUESTIONS,
    *finish.QUESTIONS,
)
