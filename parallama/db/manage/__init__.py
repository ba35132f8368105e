"""What people ask of the database, through SQLAlchemy: management, reports, migrations."""
