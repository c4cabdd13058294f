"""Captions and answers in one call: `pipeline("image-to-text" | "visual-question-answering", model=...)`."""

from .chat import Conversation, Reply
from .image_to_text import Blip2ImageToTextPipeline
from .loading import pipeline
from .visual_question_answering import Blip2VisualQuestionAnsweringPipeline

__all__ = [
    "Blip2ImageToTextPipeline",
    "Blip2VisualQuestionAnsweringPipeline",
    "Conversation",
    "Reply",
    "pipeline",
]
