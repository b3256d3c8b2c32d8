"""Which committed positions change or become masks again."""
