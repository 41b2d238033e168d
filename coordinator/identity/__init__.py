"""Who may connect, and as whom: certificates, join tokens, enrolment, the broker's callout and the fleet's HTTPS server."""
