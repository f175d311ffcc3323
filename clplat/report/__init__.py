"""What a run leaves behind: summary, tables, figures, comparison."""
