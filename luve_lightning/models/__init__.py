"""The nn.Modules."""
