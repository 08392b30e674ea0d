"""After training: runs to and from the formats that other programs read. Nothing else imports this."""
