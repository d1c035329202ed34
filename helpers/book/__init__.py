"""What makes a book of the chapters: findings, figures, pages, editions."""
