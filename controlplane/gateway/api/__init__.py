"""The gateway's own routes: status pages, plain chat and batch, reports, the operators' page."""
