"""From the hospital's PACS or folders to de-identified series that a study can train on."""
