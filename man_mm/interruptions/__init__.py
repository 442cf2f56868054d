"""Saving as a whole or not at all, and resuming exactly."""

from .checkpoint_hook import SafeCheckpointHook
from .resume_hook import ResumeHook

__all__ = ['ResumeHook', 'SafeCheckpointHook']
