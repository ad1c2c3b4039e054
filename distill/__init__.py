"""Healing: knowledge distillation from the parent (teacher) into the child (student)."""
