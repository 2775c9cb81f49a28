"""All questions, in the order in which they are asked."""

from pipeline.wizard import destination, ending, model, quantizing, rows, training

QUESTIONS = (
    *model.QUESTIONS,
    *rows.QUESTIONS,
    *training.QUESTIONS,
    *destination.QUESTIONS,
    *quantizing.QUESTIONS,
    *ending.QUESTIONS,
)
