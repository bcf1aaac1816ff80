"""What the turns of a conversation are, and how the last one is scored in their light."""
