"""Everything that runs inside the hospital; it trusts nothing from outside."""
