"""What people look at: the report page, dashboards, the human study, the judge."""
