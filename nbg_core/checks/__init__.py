"""What must hold of each asset once it is made."""
