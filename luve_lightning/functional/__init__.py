"""Stateless maths on tensors."""
