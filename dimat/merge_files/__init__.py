"""Merges model files: from models on disk to a merged model on disk, tensor by tensor."""

from dimat.merge_files.recipe import Recipe, load_recipe
from dimat.merge_files.run import Report, merge_files, prepare

__all__ = ["Recipe", "Report", "load_recipe", "merge_files", "prepare"]
